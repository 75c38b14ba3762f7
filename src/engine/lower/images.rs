//! Images.

use std::fs::File;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::Sender;

use crate::base::container::ContainerConfig;
use crate::base::id::ContainerId;
use crate::base::image::{Credentials, Image, ImageSpec, Progress, RootfsLayers};
use crate::engine::container::ContainerRecord;
use crate::engine::error::{EngineError, Result};
use crate::engine::facade::Info;
use crate::engine::lower::Lower;

/// An image that a container uses: its layers stay until it is released.
#[derive(Clone, Debug)]
pub(crate) struct Held {
    /// The image.
    pub(crate) image: Arc<Image>,
    /// Its layers.
    pub(crate) layers: RootfsLayers,
    /// The images that its mounts name.
    pub(crate) volumes: Vec<ImageVolume>,
}

/// An image that a container mounts: its layers are held with those of the container's own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ImageVolume {
    /// Index of the mount in the config.
    pub(crate) mount: usize,
    /// First repository digest, else the id: as statuses show it.
    pub(crate) image_ref: String,
    /// Layers.
    pub(crate) layers: RootfsLayers,
}

impl Held {
    /// What statuses call the image that was asked for as `asked`: that tag of it, else its first tag,
    /// else a digest, else its id.
    pub(crate) fn name(&self, asked: &str) -> String {
        let image = &self.image;
        let tags = &image.repo_tags;
        tags.iter()
            .find(|tag| *tag == asked)
            .or_else(|| tags.first())
            .or_else(|| image.repo_digests.first())
            .unwrap_or(&image.id)
            .clone()
    }

    /// First repository digest, else the id.
    pub(crate) fn reference(&self) -> String {
        reference(&self.image)
    }
}

fn reference(image: &Image) -> String {
    image.repo_digests.first().unwrap_or(&image.id).clone()
}

/// What we know of an image's config, with the names that OCI gives it (image-spec `config.md`): debuggers
/// look for them.
fn oci_config(image: &Image) -> serde_json::Value {
    let config = &image.config;
    let volumes: serde_json::Map<_, _> = config
        .volumes
        .iter()
        .map(|path| (path.clone(), serde_json::json!({})))
        .collect();
    serde_json::json!({
        "os": "linux",
        "config": {
            "User": config.user,
            "Env": config.env,
            "Entrypoint": config.entrypoint,
            "Cmd": config.cmd,
            "WorkingDir": config.working_dir,
            "Volumes": volumes,
            "StopSignal": config.stop_signal,
        },
        "rootfs": { "type": "layers", "diff_ids": image.layers },
    })
}

impl Lower {
    /// The image that the config names and those that its mounts name, held for a container.
    ///
    /// # Errors
    /// [`EngineError::NotFound`], [`EngineError::Unmountable`]: one is not here. Nothing is held then.
    pub(crate) fn hold(&self, config: &ContainerConfig, holder: ContainerId) -> Result<Held> {
        let held = self.hold_all(config, holder);
        if held.is_err() {
            self.release(holder);
        }
        held
    }

    fn hold_all(&self, config: &ContainerConfig, holder: ContainerId) -> Result<Held> {
        let asked = &config.image.image;
        let failed = || format!("image {asked:?} of the container");
        let found = self.images.find(asked);
        let image = found.ok_or_else(|| EngineError::NotFound {
            what: "image",
            id: asked.clone(),
        })?;
        if image.artifact {
            return Err(EngineError::Invalid {
                field: "image.image",
                value: asked.clone(),
                mend: "it is an artifact, nothing can run from it; mount it as a volume".to_owned(),
            });
        }
        let layers = self
            .images
            .hold(&image.id, holder)
            .map_err(EngineError::step(failed()))?;
        let mut volumes = vec![];
        for (mount, given) in config.mounts.iter().enumerate() {
            let Some(asked) = &given.image else {
                continue;
            };
            let unmountable = || EngineError::Unmountable {
                field: format!("mounts[{mount}].image"),
                image: asked.image.clone(),
            };
            let image = self.images.find(&asked.image).ok_or_else(unmountable)?;
            let held = self.images.hold(&image.id, holder);
            volumes.push(ImageVolume {
                mount,
                image_ref: reference(&image),
                layers: held.map_err(|_gone_meanwhile| unmountable())?,
            });
        }
        Ok(Held {
            image,
            layers,
            volumes,
        })
    }

    /// Holds again, after a restart, what a container held before.
    pub(crate) fn adopt_hold(&self, record: &ContainerRecord) {
        let volumes = record.image_volumes.iter().map(|volume| &volume.layers);
        for layers in std::iter::once(&record.layers).chain(volumes) {
            self.images.adopt_hold(record.id, layers);
        }
    }

    /// Removes, in the background, layers that neither an image nor a container needs, once every container of before
    /// the restart holds its own again.
    pub(crate) fn collect(&self) {
        self.images.collect_later();
    }

    /// Layers that cannot be removed. From memory.
    pub(crate) fn set_aside(&self) -> Vec<crate::store::Aside> {
        self.images.set_aside()
    }

    /// Lets go of what a container held.
    pub(crate) fn release(&self, holder: ContainerId) {
        self.images.release(&holder);
    }

    /// Pulls an image; its id.
    ///
    /// # Errors
    /// [`EngineError::Step`].
    pub(crate) async fn pull(
        &self,
        spec: ImageSpec,
        credentials: Option<Credentials>,
        progress: Option<Sender<Progress>>,
    ) -> Result<String> {
        let image = self
            .images
            .pull(&spec, credentials, progress)
            .await
            .map_err(EngineError::step(format!("pull image {:?}", spec.image)))?;
        Ok(image.id.clone())
    }

    /// Imports the images of an archive.
    ///
    /// # Errors
    /// [`EngineError::Step`].
    pub(crate) async fn import(
        &self,
        archive: File,
        name: Option<String>,
        progress: Option<Sender<Progress>>,
    ) -> Result<Vec<Arc<Image>>> {
        self.images
            .import(archive, name, progress)
            .await
            .map_err(EngineError::step("import the archive"))
    }

    /// All images, or the one that a reference names. From memory.
    pub(crate) fn list_images(&self, reference: &str) -> Vec<Arc<Image>> {
        match reference {
            "" => self.images.list(),
            reference => self.images.find(reference).into_iter().collect(),
        }
    }

    /// The image that a reference names. From memory.
    pub(crate) fn image_status(
        &self,
        reference: &str,
        verbose: bool,
    ) -> Option<(Arc<Image>, Info)> {
        let image = self.images.find(reference)?;
        let mut info = Info::new();
        if verbose {
            let text = serde_json::json!({
                "chainID": image.layers.last(),
                "imageSpec": oci_config(&image),
            });
            info.insert("info".to_owned(), text.to_string());
        }
        Some((image, info))
    }

    /// Removes the image that a reference names; one that is not here is fine.
    ///
    /// # Errors
    /// [`EngineError::Step`].
    pub(crate) async fn remove_image(&self, reference: &str) -> Result<()> {
        self.images
            .remove(reference)
            .await
            .map_err(EngineError::step(format!("remove image {reference:?}")))
    }
}
