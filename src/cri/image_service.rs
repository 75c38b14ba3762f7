//! ImageService: dispatch only.

use tonic::{Request, Response, Status};

use crate::cri::convert::image;
use crate::cri::stream::{Items, fits, pieces};
use crate::cri::v1;
use crate::cri::v1::image_service_server::ImageService;
use crate::cri::{Server, status};

/// Outcome of a call.
type Reply<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl ImageService for Server {
    type StreamImagesStream = Items<v1::StreamImagesResponse>;

    async fn list_images(
        &self,
        request: Request<v1::ListImagesRequest>,
    ) -> Reply<v1::ListImagesResponse> {
        let images = self.images(request.into_inner().filter);
        fits(v1::ListImagesResponse { images }, "StreamImages")
    }

    async fn stream_images(
        &self,
        request: Request<v1::StreamImagesRequest>,
    ) -> Reply<Self::StreamImagesStream> {
        let images = self.images(request.into_inner().filter);
        Ok(pieces(images, |images| v1::StreamImagesResponse { images }))
    }

    async fn image_status(
        &self,
        request: Request<v1::ImageStatusRequest>,
    ) -> Reply<v1::ImageStatusResponse> {
        let request = request.into_inner();
        let spec = image::required("image", request.image)?;
        let found = self
            .engine
            .image_status(&spec.image, request.verbose)
            .await
            .map_err(|error| status::of(&error))?;
        let (image, info) = found.unzip();
        Ok(Response::new(v1::ImageStatusResponse {
            image: image.map(|image| image::item(&image)),
            info: info.unwrap_or_default().into_iter().collect(),
        }))
    }

    async fn pull_image(
        &self,
        request: Request<v1::PullImageRequest>,
    ) -> Reply<v1::PullImageResponse> {
        let request = request.into_inner();
        let spec = image::required("image", request.image)?;
        let image_ref = self
            .engine
            .pull_image(spec, image::credentials(request.auth), None)
            .await
            .map_err(|error| status::of_pull(&error))?;
        Ok(Response::new(v1::PullImageResponse { image_ref }))
    }

    async fn remove_image(
        &self,
        request: Request<v1::RemoveImageRequest>,
    ) -> Reply<v1::RemoveImageResponse> {
        let spec = image::required("image", request.into_inner().image)?;
        let engine = self.engine.clone();
        self.detached(async move { engine.remove_image(&spec.image).await })
            .await?;
        Ok(Response::new(v1::RemoveImageResponse {}))
    }

    async fn image_fs_info(
        &self,
        _: Request<v1::ImageFsInfoRequest>,
    ) -> Reply<v1::ImageFsInfoResponse> {
        let (images, containers) = self
            .engine
            .image_fs_info()
            .await
            .map_err(|error| status::of(&error))?;
        Ok(Response::new(v1::ImageFsInfoResponse {
            image_filesystems: images.iter().map(image::filesystem).collect(),
            container_filesystems: containers.iter().map(image::filesystem).collect(),
        }))
    }
}

impl Server {
    fn images(&self, filter: Option<v1::ImageFilter>) -> Vec<v1::Image> {
        let reference = filter
            .and_then(|filter| filter.image)
            .map(|spec| spec.image)
            .unwrap_or_default();
        let images = self.engine.list_images(&reference);
        images.iter().map(|one| image::item(one)).collect()
    }
}
