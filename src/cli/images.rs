//! `berth image`.

use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::stream::{self, Stream};
use tokio::io::AsyncReadExt as _;

use crate::cli::client::Client;
use crate::cli::error::CliError;
use crate::cli::print;
use crate::cli::progress::Bars;
use crate::cli::table::{bytes, short, table};
use crate::cri::berth_v1::{self, import_request::Part};
use crate::cri::v1;

/// Bytes of an archive in one message.
const PIECE: usize = 256 * 1024;

/// `image ls`.
///
/// # Errors
/// [`CliError`].
pub(super) async fn list(client: &mut Client) -> Result<(), CliError> {
    let images = client
        .images
        .list_images(v1::ListImagesRequest::default())
        .await
        .map_err(CliError::call("list the images"))?
        .into_inner()
        .images;
    let mut rows = vec![["NAME", "ID", "SIZE"].map(str::to_owned)];
    for image in images {
        let names = match (image.repo_tags.is_empty(), image.repo_digests.is_empty()) {
            (false, _) => image.repo_tags,
            (true, false) => image.repo_digests,
            (true, true) => vec!["<none>".to_owned()],
        };
        for name in names {
            rows.push([name, short(&image.id), bytes(image.size)]);
        }
    }
    rows[1..].sort();
    print(&table(&rows))
}

/// `image pull`.
///
/// # Errors
/// [`CliError`].
pub(super) async fn pull(client: &mut Client, image: &str) -> Result<(), CliError> {
    let id = pull_quietly(client, image).await?;
    print(&format!("{id}\n"))
}

/// A pull with its bars; the image's id.
///
/// # Errors
/// [`CliError::Call`].
pub(super) async fn pull_quietly(client: &mut Client, image: &str) -> Result<String, CliError> {
    let failed = || CliError::call(format!("pull {image}"));
    let request = berth_v1::PullRequest {
        image: image.to_owned(),
    };
    let mut steps = client
        .own
        .pull(request)
        .await
        .map_err(failed())?
        .into_inner();
    let mut bars = Bars::new();
    let mut id = String::new();
    while let Some(step) = steps.message().await.map_err(failed())? {
        bars.update(&step.layers);
        if !step.image_id.is_empty() {
            id = step.image_id;
        }
    }
    bars.end();
    Ok(id)
}

/// `image import`.
///
/// # Errors
/// [`CliError`].
pub(super) async fn import(
    client: &mut Client,
    archive: &Path,
    name: Option<String>,
) -> Result<(), CliError> {
    let file = match archive.as_os_str().as_encoded_bytes() {
        b"-" => std::io::stdin()
            .as_fd()
            .try_clone_to_owned()
            .map(std::fs::File::from),
        _ => std::fs::File::open(archive),
    };
    let file = file.map_err(CliError::io(format!("open {}", archive.display())))?;
    let size = file
        .metadata()
        .ok()
        .filter(std::fs::Metadata::is_file)
        .map_or(0, |metadata| metadata.len());
    let mut bars = Bars::new();
    let bar = bars.upload(size);
    let unread = Arc::new(Mutex::new(None));
    let upload = pieces(
        file,
        name.unwrap_or_default(),
        bar.clone(),
        Arc::clone(&unread),
    );
    let outcome = follow(client, upload, &mut bars, &bar).await;
    bars.end();
    let unread = unread.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(error) = unread {
        return Err(CliError::io(format!("read {}", archive.display()))(error));
    }
    let images = outcome.map_err(CliError::call(format!("import {}", archive.display())))?;
    for image in images {
        if image.names.is_empty() {
            print(&format!("{}\n", image.id))?;
        }
        for name in image.names {
            print(&format!("{name} {}\n", image.id))?;
        }
    }
    Ok(())
}

async fn follow(
    client: &mut Client,
    upload: impl Stream<Item = berth_v1::ImportRequest> + Send + 'static,
    bars: &mut Bars,
    bar: &indicatif::ProgressBar,
) -> Result<Vec<berth_v1::ImportedImage>, tonic::Status> {
    let mut steps = client.own.import(upload).await?.into_inner();
    bar.finish();
    let mut images = Vec::new();
    while let Some(step) = steps.message().await? {
        bars.update(&step.layers);
        images.extend(step.images);
    }
    Ok(images)
}

/// The options, then the file piece by piece. A read that fails ends the stream and is kept in `unread`.
fn pieces(
    file: std::fs::File,
    name: String,
    bar: indicatif::ProgressBar,
    unread: Arc<Mutex<Option<std::io::Error>>>,
) -> impl Stream<Item = berth_v1::ImportRequest> + Send + 'static {
    let options = berth_v1::ImportRequest {
        part: Some(Part::Options(berth_v1::ImportOptions { name })),
    };
    let file = tokio::fs::File::from_std(file);
    stream::unfold((Some(options), file), move |(first, mut file)| {
        let (bar, unread) = (bar.clone(), Arc::clone(&unread));
        async move {
            if first.is_some() {
                return first.map(|first| (first, (None, file)));
            }
            let mut data = Vec::with_capacity(PIECE);
            let count = (&mut file).take(PIECE as u64).read_to_end(&mut data).await;
            match count {
                Ok(0) => None,
                Ok(_) => {
                    bar.inc(data.len() as u64);
                    let part = Some(Part::Data(data));
                    Some((berth_v1::ImportRequest { part }, (None, file)))
                }
                Err(error) => {
                    *unread.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                    None
                }
            }
        }
    })
}

/// `image rm`. One that is not here is an error: who types a name wants to know that it is wrong.
///
/// # Errors
/// [`CliError`].
pub(super) async fn remove(client: &mut Client, images: &[String]) -> Result<(), CliError> {
    for image in images {
        let spec = Some(v1::ImageSpec {
            image: image.clone(),
            ..Default::default()
        });
        let found = client
            .images
            .image_status(v1::ImageStatusRequest {
                image: spec.clone(),
                verbose: false,
            })
            .await
            .map_err(CliError::call(format!("look for {image}")))?;
        if found.into_inner().image.is_none() {
            return Err(CliError::Argument {
                option: "image",
                value: image.clone(),
                mend: "is not here; `berth image ls` lists what is",
            });
        }
        client
            .images
            .remove_image(v1::RemoveImageRequest { image: spec })
            .await
            .map_err(CliError::call(format!("remove {image}")))?;
    }
    Ok(())
}
