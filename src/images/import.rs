//! Images out of an archive: docker-archive (`manifest.json`) and oci-archive (`index.json`). Where both
//! are, the OCI layout counts, and the names of both.

use std::fs::File;
use std::sync::Arc;

use tokio::sync::mpsc::Sender;

use crate::base::image::{Image, ImageSpec, Progress};
use crate::base::tasks::Tasks;
use crate::images::ImageStore;
use crate::images::archive::{Archive, DockerManifest, blob_path};
use crate::images::artifact;
use crate::images::catalog::NewImage;
use crate::images::digest::Digest;
use crate::images::error::ImageError;
use crate::images::manifest::{self, Config, Descriptor, Document};
use crate::images::obtain::Verified;
use crate::images::progress::Reporter;
use crate::images::reference::Reference;
use crate::images::unpack::unpack;

const MAX_IMAGES: usize = 1000;
/// An index of indexes of ...
const MAX_NESTING: usize = 4;

/// One image of an archive, before its layers are unpacked.
struct Found {
    id: Digest,
    /// Empty for an artifact.
    config_bytes: Vec<u8>,
    artifact: bool,
    config: Config,
    layers: Vec<FoundLayer>,
    tags: Vec<String>,
    digests: Vec<String>,
    blobs: Vec<(Digest, Vec<u8>)>,
}

#[derive(Clone)]
struct FoundLayer {
    path: String,
    /// Absent in a docker-archive: the diff id alone is checked.
    digest: Option<Digest>,
    /// Of an artifact's blob, which becomes this file.
    title: Option<String>,
}

impl ImageStore {
    /// Imports every image of an archive, from a file or a pipe, compressed or not. `name` names the
    /// image where the archive holds just one.
    ///
    /// Goes on when the caller does not wait.
    ///
    /// # Errors
    ///
    /// [`ImageError::Archive`], [`ImageError::Manifest`], [`ImageError::Digest`],
    /// [`ImageError::NoPlatform`], [`ImageError::Reference`], [`ImageError::Io`]. Images imported before
    /// the failure stay.
    pub(crate) async fn import(
        &self,
        archive: File,
        name: Option<String>,
        progress: Option<Sender<Progress>>,
    ) -> Result<Vec<Arc<Image>>, ImageError> {
        let store = self.clone();
        let reporter = Reporter::default();
        reporter.listen(progress);
        let work = async move {
            let images = store.import_all(archive, name, reporter).await;
            store.tidy(images.is_err()).await;
            images
        };
        self.tasks()
            .spawn(work)
            .await
            .map_err(|_gone| ImageError::Shutdown)?
    }

    async fn import_all(
        &self,
        archive: File,
        name: Option<String>,
        reporter: Reporter,
    ) -> Result<Vec<Arc<Image>>, ImageError> {
        let store = self.clone();
        let (archive, found) = Tasks::blocking(move || {
            let archive = Archive::open(archive, store.root())?;
            let found = find_images(&store, &archive, name.as_deref())?;
            Ok::<_, ImageError>((archive, found))
        })
        .await
        .map_err(|_panic| ImageError::Shutdown)??;
        let mut images = vec![];
        for image in found {
            images.push(self.import_one(&archive, image, &reporter).await?);
        }
        Ok(images)
    }

    async fn import_one(
        &self,
        archive: &Archive,
        found: Found,
        reporter: &Reporter,
    ) -> Result<Arc<Image>, ImageError> {
        let sizes: Result<Vec<u64>, ImageError> = found
            .layers
            .iter()
            .map(|layer| archive.stream(&layer.path).map(|(_, size)| size))
            .collect();
        let sizes = sizes?;
        let names: Vec<_> = found
            .config
            .diff_ids
            .iter()
            .map(Digest::to_string)
            .collect();
        reporter.layers(names.iter().cloned().zip(sizes.iter().copied()).collect());
        let layers = self
            .obtain_all(&found.config.diff_ids, &names, reporter, |index, new| {
                let layer = found.layers[index].clone();
                let (archive, diff_id) = (archive.clone(), found.config.diff_ids[index]);
                async move {
                    Tasks::blocking(move || {
                        let what = format!("archive: {}", layer.path);
                        let (stream, _) = archive.stream(&layer.path)?;
                        let unpacked = match &layer.title {
                            Some(title) => artifact::place(stream, new.open()?, title, &what)?,
                            None => unpack(stream, new.open()?, &what, layer.digest.as_ref())?,
                        };
                        if let Some(digest) = layer.digest {
                            check(&what, &digest, &unpacked.digest)?;
                        }
                        Verified::new(new, unpacked, &diff_id, &what)
                    })
                    .await
                    .map_err(|_panic| ImageError::Shutdown)?
                }
            })
            .await?;
        let mut blobs = found.blobs;
        let size = sizes.iter().sum::<u64>() + found.config_bytes.len() as u64;
        if !found.artifact {
            blobs.push((found.id, found.config_bytes));
        }
        self.commit(NewImage {
            id: found.id,
            artifact: found.artifact,
            tags: found.tags,
            digests: found.digests,
            size,
            config: found.config.runtime,
            spec: ImageSpec::default(),
            diff_ids: found.config.diff_ids,
            layers,
            blobs,
        })
        .await
    }
}

/// Compares a digest.
///
/// # Errors
///
/// [`ImageError::Digest`].
pub(crate) fn check(what: &str, expected: &Digest, actual: &Digest) -> Result<(), ImageError> {
    match expected == actual {
        true => Ok(()),
        false => Err(ImageError::Digest {
            what: what.to_owned(),
            expected: expected.to_string(),
            actual: actual.to_string(),
        }),
    }
}

fn find_images(
    store: &ImageStore,
    archive: &Archive,
    name: Option<&str>,
) -> Result<Vec<Found>, ImageError> {
    let name = name.map(Reference::parse).transpose()?;
    let docker: Vec<DockerManifest> = match archive.has("manifest.json") {
        true => parse(
            &archive.document("manifest.json")?,
            "archive: manifest.json",
        )?,
        false => vec![],
    };
    let mut found = match archive.has("index.json") {
        true => oci_images(store, archive, &docker)?,
        false => {
            let images = docker.iter().map(|image| docker_image(archive, image));
            images.collect::<Result<Vec<_>, _>>()?
        }
    };
    if found.is_empty() {
        return Err(ImageError::archive(
            "archive",
            "it holds no image: neither manifest.json nor index.json names one",
        ));
    }
    if let Some(name) = name {
        let [image] = &mut found[..] else {
            return Err(ImageError::archive(
                "archive",
                format!(
                    "it holds {} images: a name can be given for one only",
                    found.len()
                ),
            ));
        };
        image.tags = vec![name.to_string()];
        image.digests = vec![];
    }
    Ok(found)
}

fn parse<T: serde::de::DeserializeOwned>(bytes: &[u8], what: &str) -> Result<T, ImageError> {
    serde_json::from_slice(bytes).map_err(|error| ImageError::manifest(what, error.to_string()))
}

fn docker_image(archive: &Archive, image: &DockerManifest) -> Result<Found, ImageError> {
    let config_bytes = archive.document(&image.config)?;
    let config = manifest::parse_config(&config_bytes, &format!("archive: {}", image.config))?;
    let paths = image.layers.clone().unwrap_or_default();
    if paths.len() != config.diff_ids.len() {
        return Err(ImageError::manifest(
            "archive: manifest.json",
            format!(
                "{} layers, but the config has {}",
                paths.len(),
                config.diff_ids.len()
            ),
        ));
    }
    let layer = |path| FoundLayer {
        path,
        digest: None,
        title: None,
    };
    Ok(Found {
        id: Digest::of(&config_bytes),
        artifact: false,
        config_bytes,
        config,
        layers: paths.into_iter().map(layer).collect(),
        tags: docker_tags(image)?,
        digests: vec![],
        blobs: vec![],
    })
}

fn docker_tags(image: &DockerManifest) -> Result<Vec<String>, ImageError> {
    let tags = image.repo_tags.iter().flatten();
    tags.map(|tag| Reference::parse(tag).map(|name| name.to_string()))
        .collect()
}

fn oci_images(
    store: &ImageStore,
    archive: &Archive,
    docker: &[DockerManifest],
) -> Result<Vec<Found>, ImageError> {
    let what = "archive: index.json";
    let entries = match manifest::parse_document(&archive.document("index.json")?, "", what)? {
        Document::Index(entries) => entries,
        Document::Manifest(_) => return Err(ImageError::manifest(what, "not an index")),
    };
    if entries.len() > MAX_IMAGES {
        return Err(ImageError::TooLarge {
            what: what.into(),
            limit: format!("{MAX_IMAGES} images"),
        });
    }
    let mut found: Vec<Found> = vec![];
    for group in groups(entries) {
        let chosen = match &group.entries[..] {
            [only] => only,
            several => store
                .wanted()
                .choose(several)
                .ok_or_else(|| no_platform(store, several))?,
        };
        let mut image = oci_image(store, archive, chosen, MAX_NESTING)?;
        if let Some(name) = &group.name {
            image.tags.push(name.to_string());
            image
                .digests
                .push(name.with_digest(chosen.digest).to_string());
        } else if let Some(same) = docker
            .iter()
            .find(|other| plain_hex(&other.config) == Some(Digest::of(&image.config_bytes).hex()))
        {
            image.tags = docker_tags(same)?;
        }
        match found.iter_mut().find(|other| other.id == image.id) {
            Some(other) => {
                other.tags.append(&mut image.tags);
                other.digests.append(&mut image.digests);
                other.blobs.append(&mut image.blobs);
            }
            None => found.push(image),
        }
    }
    Ok(found)
}

/// The digits of a config's path: `<hex>.json` or `blobs/sha256/<hex>`.
fn plain_hex(path: &str) -> Option<String> {
    let name = path.rsplit('/').next()?;
    let hex = name.strip_suffix(".json").unwrap_or(name);
    (hex.len() == 64).then(|| hex.to_owned())
}

fn no_platform(store: &ImageStore, offered: &[Descriptor]) -> ImageError {
    let offered: Vec<_> = offered
        .iter()
        .filter_map(|entry| entry.platform.as_ref().map(ToString::to_string))
        .collect();
    ImageError::NoPlatform {
        reference: "archive".into(),
        wanted: store.wanted().to_string(),
        offered: offered.join(", "),
    }
}

struct Group {
    name: Option<Reference>,
    entries: Vec<Descriptor>,
}

/// Entries of one name are one image for several platforms; so are entries without a name that all have
/// a platform.
fn groups(entries: Vec<Descriptor>) -> Vec<Group> {
    let mut groups: Vec<Group> = vec![];
    for entry in entries {
        let name = name_of(&entry);
        let same = groups.iter_mut().find(|group| {
            let all = group.entries.iter().chain([&entry]);
            group.name == name && (name.is_some() || all.clone().all(|e| e.platform.is_some()))
        });
        match same {
            Some(group) => group.entries.push(entry),
            None => groups.push(Group {
                name,
                entries: vec![entry],
            }),
        }
    }
    groups
}

/// containerd writes the full name in its own annotation; others use OCI's, for a name or a mere tag.
fn name_of(entry: &Descriptor) -> Option<Reference> {
    let annotations = entry.annotations.as_ref()?;
    let full = annotations.get("io.containerd.image.name");
    let name = full.or_else(|| {
        let name = annotations.get("org.opencontainers.image.ref.name")?;
        name.contains(['/', ':']).then_some(name)
    })?;
    Reference::parse(name).ok()
}

fn oci_image(
    store: &ImageStore,
    archive: &Archive,
    entry: &Descriptor,
    nesting: usize,
) -> Result<Found, ImageError> {
    let what = format!("archive: {}", blob_path(&entry.digest));
    let bytes = archive.blob(&entry.digest)?;
    let manifest = match manifest::parse_document(&bytes, &entry.media_type, &what)? {
        Document::Manifest(manifest) => manifest,
        Document::Index(entries) => {
            if nesting == 0 {
                return Err(ImageError::manifest(what, "indexes nested too deeply"));
            }
            // An archive of one platform may come with the index of all.
            let here: Vec<_> = entries
                .iter()
                .filter(|entry| archive.has(&blob_path(&entry.digest)))
                .cloned()
                .collect();
            let chosen = store
                .wanted()
                .choose(&here)
                .ok_or_else(|| no_platform(store, &entries))?;
            let mut image = oci_image(store, archive, chosen, nesting - 1)?;
            image.blobs.push((entry.digest, bytes));
            return Ok(image);
        }
    };
    let artifact = artifact::is_artifact(&manifest.config.media_type);
    let (id, config_bytes, config, titles) = if artifact {
        let (titles, config) = artifact::layout(&manifest, &what)?;
        (entry.digest, vec![], config, titles)
    } else {
        let bytes = archive.blob(&manifest.config.digest)?;
        let config = manifest::parse_config(&bytes, &what)?;
        (Digest::of(&bytes), bytes, config, vec![])
    };
    if manifest.layers.len() != config.diff_ids.len() {
        return Err(ImageError::manifest(
            what,
            format!(
                "{} layers, but the config has {}",
                manifest.layers.len(),
                config.diff_ids.len()
            ),
        ));
    }
    let mut titles = titles.into_iter();
    let layers = manifest.layers.iter().map(|layer| FoundLayer {
        path: blob_path(&layer.digest),
        digest: Some(layer.digest),
        title: titles.next(),
    });
    Ok(Found {
        id,
        artifact,
        config_bytes,
        config,
        layers: layers.collect(),
        tags: vec![],
        digests: vec![],
        blobs: vec![(entry.digest, bytes)],
    })
}
