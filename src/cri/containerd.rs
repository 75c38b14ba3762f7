//! The few calls of containerd's API by which kubelet's cAdvisor finds containers.
//!
//! kubelet is pointed here with `--containerd=<our socket>`. cAdvisor sends `containerd-namespace:
//! k8s.io` as metadata; there is one namespace here, so it is not looked at.

use prost_types::{Any, Timestamp};
use tonic::{Request, Response, Status};

use crate::base::clock;
use crate::cri::containerd_api::services::containers::v1 as containers;
use crate::cri::containerd_api::services::tasks::v1 as tasks;
use crate::cri::containerd_api::services::version::v1 as version;
use crate::cri::containerd_api::v1::types;
use crate::cri::convert::{check, hashed};
use crate::cri::{Server, VERSION};
use crate::engine::Inspection;

/// The type of the OCI spec in containerd's API.
const SPEC: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";

impl Server {
    async fn inspected(&self, field: &str, id: &str) -> Result<Inspection, Status> {
        check::id(field, id)?;
        let found = self.engine.inspect(id).await;
        found.ok_or_else(|| Status::not_found(format!("container {id:?}: not found")))
    }
}

fn timestamp(at: clock::Timestamp) -> Timestamp {
    const SECOND: i64 = 1_000_000_000;
    Timestamp {
        seconds: at.0.div_euclid(SECOND),
        nanos: i32::try_from(at.0.rem_euclid(SECOND)).unwrap_or_default(),
    }
}

#[tonic::async_trait]
impl containers::containers_server::Containers for Server {
    async fn get(
        &self,
        request: Request<containers::GetContainerRequest>,
    ) -> Result<Response<containers::GetContainerResponse>, Status> {
        let id = request.into_inner().id;
        let found = self.inspected("id", &id).await?;
        let created_at = Some(timestamp(found.created_at));
        Ok(Response::new(containers::GetContainerResponse {
            container: Some(containers::Container {
                id,
                labels: hashed(&found.labels),
                image: found.image,
                runtime: Some(containers::container::Runtime {
                    name: "berth".to_owned(),
                    options: None,
                }),
                spec: Some(Any {
                    type_url: SPEC.to_owned(),
                    value: found.spec.into_bytes(),
                }),
                created_at,
                updated_at: created_at,
                ..Default::default()
            }),
        }))
    }
}

#[tonic::async_trait]
impl tasks::tasks_server::Tasks for Server {
    async fn get(
        &self,
        request: Request<tasks::GetRequest>,
    ) -> Result<Response<tasks::GetResponse>, Status> {
        let request = request.into_inner();
        let id = request.container_id;
        let found = self.inspected("container_id", &id).await?;
        let mut process = types::Process {
            container_id: id.clone(),
            id: id.clone(),
            pid: found.pid,
            status: types::Status::Running as i32,
            ..Default::default()
        };
        match found.ended {
            _ if !request.exec_id.is_empty() => {
                return Err(Status::not_found(format!(
                    "task {id:?}: no exec session is known by id"
                )));
            }
            // cAdvisor asks for the exit code when the cgroup goes.
            Some((code, at)) => {
                process.status = types::Status::Stopped as i32;
                process.exit_status = code.cast_unsigned();
                process.exited_at = Some(timestamp(at));
            }
            None if found.pid == 0 => {
                return Err(Status::not_found(format!("task {id:?}: no process runs")));
            }
            None => {}
        }
        Ok(Response::new(tasks::GetResponse {
            process: Some(process),
        }))
    }
}

#[tonic::async_trait]
impl version::version_server::Version for Server {
    async fn version(&self, _: Request<()>) -> Result<Response<version::VersionResponse>, Status> {
        Ok(Response::new(version::VersionResponse {
            version: VERSION.to_owned(),
            revision: String::new(),
        }))
    }
}
