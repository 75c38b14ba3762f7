//! The lists behind the List and Stream calls, and the stream of events.

use futures_util::stream;
use tonic::Status;

use crate::cri::convert::{container, pod, stats};
use crate::cri::stream::Items;
use crate::cri::{Server, metrics, status, v1};
use crate::engine::Silence;

/// Waits until the daemon ends.
async fn ends(closing: &mut tokio::sync::watch::Receiver<bool>) {
    // An error means that the sender is gone: the daemon has ended.
    let _seen = closing.wait_for(|closing| *closing).await.is_ok();
}

impl Server {
    pub(super) fn pods(
        &self,
        filter: Option<v1::PodSandboxFilter>,
    ) -> Result<Vec<v1::PodSandbox>, Status> {
        let pods = self.engine.list_pod_sandboxes(&pod::filter(filter)?);
        Ok(pods.iter().map(|one| pod::item(one)).collect())
    }

    pub(super) fn containers(
        &self,
        filter: Option<v1::ContainerFilter>,
    ) -> Result<Vec<v1::Container>, Status> {
        let containers = self.engine.list_containers(&container::filter(filter)?);
        Ok(containers.iter().map(|one| container::item(one)).collect())
    }

    pub(super) async fn container_figures(
        &self,
        filter: Option<v1::ContainerStatsFilter>,
    ) -> Result<Vec<v1::ContainerStats>, Status> {
        let figures = self
            .engine
            .list_container_stats(&container::stats_filter(filter))
            .await
            .map_err(|error| status::of(&error))?;
        Ok(figures.iter().map(stats::container).collect())
    }

    pub(super) async fn metrics(&self) -> Result<Vec<metrics::Encoded>, Status> {
        let found = self.engine.metrics().await;
        let found = found.map_err(|error| status::of(&error))?;
        Ok(metrics::all(&found))
    }

    pub(super) async fn pod_figures(
        &self,
        filter: Option<v1::PodSandboxStatsFilter>,
    ) -> Result<Vec<v1::PodSandboxStats>, Status> {
        let figures = self
            .engine
            .list_pod_sandbox_stats(&pod::stats_filter(filter))
            .await
            .map_err(|error| status::of(&error))?;
        Ok(figures.iter().map(stats::pod).collect())
    }

    /// Events as they happen.
    pub(super) fn event_stream(&self) -> Items<v1::ContainerEventResponse> {
        let state = Some((self.engine.events(), self.settings.closing.clone()));
        // The stream ends after an error: a reader that has lost events must list anew.
        let events = stream::unfold(state, |state| async move {
            let (mut events, mut closing) = state?;
            let event = tokio::select! {
                event = events.next() => event,
                () = ends(&mut closing) => Err(Silence::Ended),
            };
            let ended = match event {
                Ok(event) => return Some((Ok(container::event(&event)), Some((events, closing)))),
                Err(Silence::Lost(lost)) => Status::data_loss(format!(
                    "{lost} events were dropped because they were not read in time: list, then ask again"
                )),
                Err(Silence::Ended) => Status::unavailable("the daemon ends"),
            };
            Some((Err(ended), None))
        });
        Box::pin(events)
    }
}
