//! berth's own service beside CRI: imports, and pulls that tell how far they are.

use std::sync::Arc;

use futures_util::stream;
use tokio::sync::{mpsc, oneshot};
use tonic::{Request, Response, Status, Streaming};

use crate::base::image::{Image, ImageSpec, Progress};
use crate::base::tasks::Tasks;
use crate::cri::berth_v1::{self, images_server::Images, import_request::Part};
use crate::cri::convert::{check, image};
use crate::cri::stream::Items;
use crate::cri::{Server, status, v1};
use crate::engine::Result as EngineResult;

/// Steps kept for a reader that is slow.
const STEPS: usize = 64;

#[tonic::async_trait]
impl Images for Server {
    type ImportStream = Items<berth_v1::ImportResponse>;
    type PullStream = Items<berth_v1::PullResponse>;

    async fn import(
        &self,
        request: Request<Streaming<berth_v1::ImportRequest>>,
    ) -> Result<Response<Self::ImportStream>, Status> {
        let mut parts = request.into_inner();
        let first = parts.message().await?.and_then(|first| first.part);
        let Some(Part::Options(options)) = first else {
            return Err(check::missing("options", "send them in the first message").into());
        };
        let archive = self.receive(parts).await?;
        let (steps, progress) = mpsc::channel(STEPS);
        let engine = self.engine.clone();
        let name = Some(options.name).filter(|name| !name.is_empty());
        let done = self
            .tasks
            .spawn(async move { engine.import_images(archive, name, Some(steps)).await });
        Ok(Response::new(follow(
            progress,
            done,
            |layers| berth_v1::ImportResponse {
                layers,
                images: vec![],
            },
            |images: Vec<Arc<Image>>| berth_v1::ImportResponse {
                layers: vec![],
                images: images.iter().map(|one| imported(one)).collect(),
            },
        )))
    }

    async fn pull(
        &self,
        request: Request<berth_v1::PullRequest>,
    ) -> Result<Response<Self::PullStream>, Status> {
        let spec: ImageSpec = image::required(
            "image",
            Some(v1::ImageSpec {
                image: request.into_inner().image,
                ..Default::default()
            }),
        )?;
        let (steps, progress) = mpsc::channel(STEPS);
        let engine = self.engine.clone();
        let done = self
            .tasks
            .spawn(async move { engine.pull_image(spec, None, Some(steps)).await });
        Ok(Response::new(follow(
            progress,
            done,
            |layers| berth_v1::PullResponse {
                layers,
                image_id: String::new(),
            },
            |image_id| berth_v1::PullResponse {
                layers: vec![],
                image_id,
            },
        )))
    }
}

impl Server {
    /// The archive as an unnamed file: nothing to clean up, whatever happens.
    async fn receive(
        &self,
        mut parts: Streaming<berth_v1::ImportRequest>,
    ) -> Result<std::fs::File, Status> {
        let scratch = self.settings.scratch.clone();
        let failed = move |error: std::io::Error| {
            let text = format!("store the archive below {}: {error}", scratch.display());
            match error.kind() {
                std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                    Status::resource_exhausted(text)
                }
                _ => Status::internal(text),
            }
        };
        let scratch = self.settings.scratch.clone();
        let file = Tasks::blocking(move || {
            use std::os::unix::fs::OpenOptionsExt as _;
            std::fs::OpenOptions::new()
                .read(true)
                .write(true)
                .mode(0o600)
                .custom_flags(rustix::fs::OFlags::TMPFILE.bits().cast_signed())
                .open(scratch)
        });
        let file = file.await.map_err(|_lost| status::panicked())?;
        let mut file = tokio::fs::File::from_std(file.map_err(&failed)?);
        while let Some(message) = parts.message().await? {
            match message.part {
                Some(Part::Data(data)) => {
                    tokio::io::AsyncWriteExt::write_all(&mut file, &data)
                        .await
                        .map_err(&failed)?;
                }
                _ => {
                    return Err(
                        check::missing("data", "send it in every message after the first").into(),
                    );
                }
            }
        }
        tokio::io::AsyncWriteExt::flush(&mut file)
            .await
            .map_err(&failed)?;
        tokio::io::AsyncSeekExt::rewind(&mut file)
            .await
            .map_err(&failed)?;
        Ok(file.into_std().await)
    }
}

fn imported(image: &Image) -> berth_v1::ImportedImage {
    berth_v1::ImportedImage {
        id: image.id.clone(),
        names: image.repo_tags.clone(),
    }
}

fn layers(step: Progress) -> Vec<berth_v1::LayerProgress> {
    match step {
        Progress::Layers(all) => all
            .into_iter()
            .map(|(digest, total)| berth_v1::LayerProgress {
                digest,
                total,
                ..Default::default()
            })
            .collect(),
        Progress::Layer {
            digest,
            bytes,
            done,
        } => vec![berth_v1::LayerProgress {
            digest,
            total: 0,
            bytes,
            done,
        }],
    }
}

/// Steps as they come, then the end.
fn follow<T: Send + 'static, M: Send + 'static>(
    progress: mpsc::Receiver<Progress>,
    done: oneshot::Receiver<EngineResult<T>>,
    step: fn(Vec<berth_v1::LayerProgress>) -> M,
    end: fn(T) -> M,
) -> Items<M> {
    let messages = stream::unfold(Some((progress, done)), move |state| async move {
        let (mut progress, done) = state?;
        if let Some(news) = progress.recv().await {
            return Some((Ok(step(layers(news))), Some((progress, done))));
        }
        let last = match done.await {
            Ok(Ok(outcome)) => Ok(end(outcome)),
            Ok(Err(error)) => Err(status::of_pull(&error)),
            Err(_lost) => Err(status::panicked()),
        };
        Some((last, None))
    });
    Box::pin(messages)
}
