//! Plugins over real sockets: a peer that answers by a function, against [`Nri`] and a node that notes.

use std::sync::atomic::{AtomicUsize, Ordering};

use prost::Message;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::mpsc;

use super::*;
use crate::base::container::{ContainerConfig, ContainerState, ContainerStatus};
use crate::base::pod::{PodConfig, PodState, PodStatus};
use crate::nri::proto::{api, ttrpc};

const PATIENCE: Duration = Duration::from_secs(30);
const SHORT: Duration = Duration::from_millis(100);

#[derive(Default)]
struct Notes {
    pods: Mutex<Vec<PodFacts>>,
    containers: Mutex<Vec<ContainerFacts>>,
    updates: Mutex<Vec<Update>>,
    evictions: Mutex<Vec<(String, String)>>,
}

#[derive(Clone, Default)]
struct TestNode(Arc<Notes>);

impl Node for TestNode {
    fn snapshot(&self) -> Work<'_, (Vec<PodFacts>, Vec<ContainerFacts>)> {
        let pods = self.0.pods.lock().unwrap().clone();
        let containers = self.0.containers.lock().unwrap().clone();
        Box::pin(async move { (pods, containers) })
    }

    fn update(&self, update: Update) -> Work<'_, Result<(), String>> {
        let bad = update.id == "bad";
        self.0.updates.lock().unwrap().push(update);
        Box::pin(async move {
            match bad {
                true => Err("no such container".to_owned()),
                false => Ok(()),
            }
        })
    }

    fn evict(&self, id: String, _: String, reason: String) {
        self.0.evictions.lock().unwrap().push((id, reason));
    }
}

struct World {
    _directory: tempfile::TempDir,
    socket: PathBuf,
    node: TestNode,
    nri: Nri,
}

impl World {
    async fn new(request_timeout: Duration) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("nri/nri.sock");
        let nri = Nri::new(NriConfig {
            socket: Some(socket.clone()),
            plugins: None,
            plugin_config: directory.path().to_owned(),
            registration_timeout: PATIENCE,
            request_timeout,
            validator: None,
            version: "test",
        });
        let node = TestNode::default();
        nri.start(Arc::new(node.clone())).await;
        Self {
            _directory: directory,
            socket,
            node,
            nri,
        }
    }

    /// Waits until so many plugins have joined.
    async fn joined(&self, count: usize) {
        let all = async {
            while self.nri.state().0.len() != count {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(PATIENCE, all).await.unwrap();
    }
}

type Handler = Arc<dyn Fn(&str, &[u8]) -> Result<Vec<u8>, (i32, String)> + Send + Sync>;

/// A plugin: what it was asked comes out of `calls`; frames into `ask` are calls of its own.
struct Peer {
    calls: mpsc::UnboundedReceiver<String>,
    ask: mpsc::UnboundedSender<(String, Vec<u8>)>,
    answers: mpsc::UnboundedReceiver<ttrpc::Response>,
    end: tokio::sync::oneshot::Sender<()>,
}

fn framed(connection: u32, stream: u32, kind: u8, data: &[u8]) -> Vec<u8> {
    let mut out = connection.to_be_bytes().to_vec();
    let length = u32::try_from(data.len()).unwrap();
    out.extend((length + 10).to_be_bytes());
    out.extend(length.to_be_bytes());
    out.extend(stream.to_be_bytes());
    out.extend([kind, 0]);
    out.extend(data);
    out
}

impl Peer {
    async fn connect(world: &World, index: &str, handler: Handler) -> Self {
        let stream = UnixStream::connect(&world.socket).await.unwrap();
        let (ask, mut asked) = mpsc::unbounded_channel::<(String, Vec<u8>)>();
        let (told, calls) = mpsc::unbounded_channel();
        let (answered, answers) = mpsc::unbounded_channel();
        let (end, mut ended) = tokio::sync::oneshot::channel::<()>();
        let register = api::RegisterPluginRequest {
            plugin_name: "peer".to_owned(),
            plugin_idx: index.to_owned(),
            nri_version: String::new(),
        };
        ask.send(("RegisterPlugin".to_owned(), register.encode_to_vec()))
            .unwrap();
        let work = async move {
            let (mut reader, mut writer) = stream.into_split();
            let (mut buffers, mut next) = ([vec![], vec![]], 1);
            let (pieces, mut incoming) = mpsc::unbounded_channel();
            let reading = async move {
                while let Ok(connection) = reader.read_u32().await {
                    let length = reader.read_u32().await.unwrap();
                    let mut bytes = vec![0; usize::try_from(length).unwrap()];
                    reader.read_exact(&mut bytes).await.unwrap();
                    pieces.send((connection, bytes)).unwrap();
                }
            };
            let serving = async move {
                loop {
                    tokio::select! {
                        Some((method, payload)) = asked.recv() => {
                            let request = ttrpc::Request {
                                service: RUNTIME.to_owned(), method, payload, ..ttrpc::Request::default()
                            };
                            writer.write_all(&framed(2, next, 1, &request.encode_to_vec())).await.unwrap();
                            next += 2;
                        }
                        piece = incoming.recv() => {
                            let Some((connection, bytes)) = piece else { return };
                            let buffer = &mut buffers[usize::try_from(connection).unwrap() - 1];
                            buffer.extend(bytes);
                            while buffer.len() >= 10 {
                                let length = u32::from_be_bytes(buffer[..4].try_into().unwrap());
                                let length = usize::try_from(length).unwrap();
                                if buffer.len() < 10 + length { break; }
                                let stream = u32::from_be_bytes(buffer[4..8].try_into().unwrap());
                                let data: Vec<u8> = buffer.drain(..10 + length).skip(10).collect();
                                if connection == 2 {
                                    let _heard = answered.send(ttrpc::Response::decode(&*data).unwrap()).is_ok();
                                    continue;
                                }
                                let request = ttrpc::Request::decode(&*data).unwrap();
                                let _heard = told.send(request.method.clone()).is_ok();
                                let response = match handler(&request.method, &request.payload) {
                                    Ok(payload) => ttrpc::Response { status: None, payload },
                                    Err((0, _)) => continue, // never answers
                                    Err((code, message)) => ttrpc::Response {
                                        status: Some(ttrpc::Status { code, message }), payload: vec![],
                                    },
                                };
                                writer.write_all(&framed(1, stream, 2, &response.encode_to_vec())).await.unwrap();
                            }
                        }
                        _ = &mut ended => return,
                    }
                }
            };
            tokio::select! { () = reading => {} () = serving => {} }
        };
        drop(tokio::task::spawn_local(work));
        Self {
            calls,
            ask,
            answers,
            end,
        }
    }

    /// The next call that this plugin got.
    async fn call(&mut self) -> String {
        tokio::time::timeout(PATIENCE, self.calls.recv())
            .await
            .unwrap()
            .unwrap()
    }

    async fn calls(&mut self, expected: &[&str]) {
        for name in expected {
            assert_eq!(self.call().await, *name);
        }
    }
}

fn handler(
    special: impl Fn(&str, &[u8]) -> Option<Result<Vec<u8>, (i32, String)>> + Send + Sync + 'static,
) -> Handler {
    Arc::new(move |method, payload| {
        special(method, payload).unwrap_or_else(|| {
            Ok(match method {
                "Configure" => api::ConfigureResponse { events: 0 }.encode_to_vec(),
                "Synchronize" => api::SynchronizeResponse {
                    update: vec![],
                    more: api::SynchronizeRequest::decode(payload).unwrap().more,
                }
                .encode_to_vec(),
                _ => vec![],
            })
        })
    })
}

fn pod() -> PodFacts {
    let id = "a".repeat(64).parse().unwrap();
    PodFacts {
        status: Arc::new(PodStatus {
            id,
            metadata: crate::base::pod::PodMetadata::default(),
            state: PodState::Ready,
            created_at: crate::base::clock::Timestamp(1),
            labels: [].into(),
            annotations: [].into(),
            runtime_handler: String::new(),
            ips: vec![],
            namespaces: crate::base::security::NamespaceOptions::default(),
        }),
        config: PodConfig::default(),
        cgroup_parent: "/p".to_owned(),
        cgroup: "/p/a".to_owned(),
        pid: 1,
    }
}

fn container(padding: usize) -> ContainerFacts {
    let id = "b".repeat(64).parse().unwrap();
    ContainerFacts {
        seccomp: None,
        status: Arc::new(ContainerStatus {
            id,
            pod_id: "a".repeat(64).parse().unwrap(),
            name: "main".to_owned(),
            attempt: 0,
            state: ContainerState::Created,
            created_at: crate::base::clock::Timestamp(1),
            started_at: crate::base::clock::Timestamp(0),
            finished_at: crate::base::clock::Timestamp(0),
            exit_code: 0,
            image: crate::base::image::ImageSpec::default(),
            image_name: String::new(),
            image_ref: String::new(),
            image_id: String::new(),
            reason: String::new(),
            message: String::new(),
            labels: [].into(),
            annotations: [].into(),
            mounts: vec![],
            log_path: String::new(),
            resources: Resources::default(),
            user: None,
            stop_signal: 15,
        }),
        config: ContainerConfig::default(),
        resources: Resources::default(),
        pid: 0,
        spec: serde_json::json!({ "process": { "args": ["x".repeat(padding)] } }),
    }
}

async fn locally(test: impl Future<Output = ()>) {
    tokio::task::LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn plugins_are_asked_in_the_order_of_their_indices() {
    locally(Box::pin(async {
        let world = World::new(PATIENCE).await;
        let order = Arc::new(Mutex::new(vec![]));
        let note = |index: &'static str| {
            let order = Arc::clone(&order);
            handler(move |method, _| {
                if method == "RunPodSandbox" {
                    order.lock().unwrap().push(index);
                }
                None
            })
        };
        let mut late = Peer::connect(&world, "90", note("90")).await;
        late.calls(&["Configure", "Synchronize"]).await;
        let mut early = Peer::connect(&world, "10", note("10")).await;
        early.calls(&["Configure", "Synchronize"]).await;
        world.joined(2).await;
        world.nri.round().await.run_pod(&pod()).await.unwrap();
        assert_eq!(*order.lock().unwrap(), ["10", "90"]);
        let round = world.nri.round().await;
        let limits = Resources::default();
        round.update_pod(&pod(), &limits, &limits).await.unwrap();
        round.pod(PodEvent::PostUpdate, &pod()).await;
        drop(round);
        assert_eq!(world.nri.state().0, ["10-peer", "90-peer"]);
        // One that leaves is out.
        early.end.send(()).unwrap();
        world.joined(1).await;
        world.nri.stop().await;
        late.calls(&[
            "RunPodSandbox",
            "UpdatePodSandbox",
            "PostUpdatePodSandbox",
            "Shutdown",
        ])
        .await;
        assert!(!world.socket.exists());
    }))
    .await;
}

#[tokio::test]
async fn a_plugin_that_hangs_is_closed_and_the_request_goes_on() {
    locally(Box::pin(async {
        let world = World::new(SHORT).await;
        let hangs =
            handler(|method, _| (method == "RunPodSandbox").then(|| Err((0, String::new()))));
        let _hanging = Peer::connect(&world, "10", hangs).await;
        world.joined(1).await;
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        let counts = handler(move |method, _| {
            count.fetch_add(usize::from(method == "RunPodSandbox"), Ordering::Relaxed);
            None
        });
        let _fine = Peer::connect(&world, "20", counts).await;
        world.joined(2).await;
        world.nri.round().await.run_pod(&pod()).await.unwrap();
        assert_eq!(asked.load(Ordering::Relaxed), 1);
        world.joined(1).await;
        assert_eq!(world.nri.state().0, ["20-peer"]);
    }))
    .await;
}

#[tokio::test]
async fn who_agreed_before_a_refusal_is_told_of_the_end() {
    locally(Box::pin(async {
        let world = World::new(PATIENCE).await;
        let mut agrees = Peer::connect(&world, "10", handler(|_, _| None)).await;
        world.joined(1).await;
        let refuses = handler(|method, _| {
            let refused = matches!(method, "RunPodSandbox" | "CreateContainer");
            refused.then(|| Err((2, "not today".to_owned())))
        });
        let mut refuser = Peer::connect(&world, "20", refuses).await;
        world.joined(2).await;
        let never = Peer::connect(&world, "30", handler(|_, _| None)).await;
        world.joined(3).await;
        let error = world.nri.round().await.run_pod(&pod()).await.unwrap_err();
        let text = chain(&error);
        assert!(
            text.contains("20-peer") && text.contains("not today"),
            "{text}"
        );
        let round = world.nri.round().await;
        assert!(round.create(&pod(), &container(0)).await.is_err());
        drop(round);
        agrees
            .calls(&[
                "Configure",
                "Synchronize",
                "RunPodSandbox",
                "StopPodSandbox",
                "RemovePodSandbox",
            ])
            .await;
        agrees
            .calls(&["CreateContainer", "StopContainer", "RemoveContainer"])
            .await;
        refuser
            .calls(&[
                "Configure",
                "Synchronize",
                "RunPodSandbox",
                "CreateContainer",
            ])
            .await;
        let mut calls = never.calls;
        let mut seen = vec![];
        while let Ok(call) = calls.try_recv() {
            seen.push(call);
        }
        assert_eq!(seen, ["Configure", "Synchronize"]);
    }))
    .await;
}

#[tokio::test]
async fn old_plugins_get_state_changes() {
    locally(Box::pin(async {
        let world = World::new(PATIENCE).await;
        let seen = Arc::new(Mutex::new(vec![]));
        let note = Arc::clone(&seen);
        let old = handler(move |method, payload| match method {
            "RunPodSandbox" | "StartContainer" => Some(Err((12, "unknown method".to_owned()))),
            "StateChange" => {
                let change = api::StateChangeEvent::decode(payload).unwrap();
                note.lock().unwrap().push((
                    change.event,
                    change.pod.is_some(),
                    change.container.is_some(),
                ));
                None
            }
            _ => None,
        });
        let mut peer = Peer::connect(&world, "10", old).await;
        world.joined(1).await;
        for _ in 0..2 {
            world.nri.round().await.run_pod(&pod()).await.unwrap();
        }
        world
            .nri
            .round()
            .await
            .start(&pod(), &container(0))
            .await
            .unwrap();
        let expected = [(1, true, false), (1, true, false), (6, true, true)];
        assert_eq!(*seen.lock().unwrap(), expected);
        peer.calls(&[
            "Configure",
            "Synchronize",
            "RunPodSandbox",
            "StateChange",
            "StateChange",
        ])
        .await;
    }))
    .await;
}

#[tokio::test]
async fn a_large_state_comes_in_parts() {
    locally(Box::pin(async {
        let world = World::new(PATIENCE).await;
        let containers = (0..30).map(|_| container(400_000)).collect();
        *world.node.0.containers.lock().unwrap() = containers;
        *world.node.0.pods.lock().unwrap() = vec![pod()];
        let got = Arc::new(Mutex::new((0, 0, 0)));
        let note = Arc::clone(&got);
        let counts = handler(move |method, payload| {
            if method == "Synchronize" {
                let part = api::SynchronizeRequest::decode(payload).unwrap();
                let mut got = note.lock().unwrap();
                got.0 += 1;
                got.1 += part.pods.len();
                got.2 += part.containers.len();
            }
            None
        });
        let _peer = Peer::connect(&world, "10", counts).await;
        world.joined(1).await;
        let (parts, pods, containers) = *got.lock().unwrap();
        assert_eq!((parts, pods, containers), (3, 1, 30));
        // One that does not know of parts is turned away.
        let unaware = handler(|method, _| (method == "Synchronize").then(|| Ok(vec![])));
        let mut peer = Peer::connect(&world, "20", unaware).await;
        peer.calls(&["Configure", "Synchronize"]).await;
        assert!(
            tokio::time::timeout(PATIENCE, peer.calls.recv())
                .await
                .unwrap()
                .is_none()
        );
        assert_eq!(world.nri.state().0.len(), 1);
    }))
    .await;
}

#[tokio::test]
async fn updates_and_evictions() {
    locally(Box::pin(async {
        let world = World::new(PATIENCE).await;
        let evicts = handler(|method, _| {
            let response = api::CreateContainerResponse {
                adjust: None,
                update: vec![api::ContainerUpdate {
                    container_id: "other".to_owned(),
                    ..api::ContainerUpdate::default()
                }],
                evict: vec![api::ContainerEviction {
                    container_id: "old".to_owned(),
                    reason: "too loud".to_owned(),
                }],
            };
            (method == "CreateContainer").then(|| Ok(response.encode_to_vec()))
        });
        let mut peer = Peer::connect(&world, "10", evicts).await;
        world.joined(1).await;
        let round = world.nri.round().await;
        let made = round.create(&pod(), &container(0)).await.unwrap();
        drop(round);
        assert_eq!(
            (
                made.evictions[0].id.as_str(),
                made.evictions[0].reason.as_str()
            ),
            ("old", "too loud")
        );
        assert_eq!(
            (made.updates[0].id.as_str(), made.updates[0].by.as_str()),
            ("other", "10-peer")
        );
        // Unasked.
        let update = |id: &str, ignore_failure| api::ContainerUpdate {
            container_id: id.to_owned(),
            linux: None,
            ignore_failure,
        };
        let request = api::UpdateContainersRequest {
            update: vec![
                update("good", false),
                update("bad", false),
                update("bad", true),
            ],
            evict: vec![api::ContainerEviction {
                container_id: "c".to_owned(),
                reason: "full".to_owned(),
            }],
        };
        peer.ask
            .send(("UpdateContainers".to_owned(), request.encode_to_vec()))
            .unwrap();
        peer.answers.recv().await.unwrap(); // of the registration
        let answer = tokio::time::timeout(PATIENCE, peer.answers.recv())
            .await
            .unwrap()
            .unwrap();
        let answer = api::UpdateContainersResponse::decode(&*answer.payload).unwrap();
        let failed: Vec<_> = answer
            .failed
            .iter()
            .map(|update| &*update.container_id)
            .collect();
        assert_eq!(failed, ["bad"]);
        assert_eq!(world.node.0.updates.lock().unwrap().len(), 3);
        let evictions = world.node.0.evictions.lock().unwrap().clone();
        assert_eq!(evictions, [("c".to_owned(), "full".to_owned())]);
    }))
    .await;
}

#[tokio::test]
async fn bad_plugins_are_turned_away() {
    locally(Box::pin(async {
        let world = World::new(PATIENCE).await;
        let events = handler(|method, _| {
            let answer = api::ConfigureResponse { events: 1 << 20 }.encode_to_vec();
            (method == "Configure").then_some(Ok(answer))
        });
        for (index, handler) in [("x1", handler(|_, _| None)), ("10", events)] {
            let mut peer = Peer::connect(&world, index, handler).await;
            let end = async { while peer.calls.recv().await.is_some() {} };
            tokio::time::timeout(PATIENCE, end).await.unwrap();
        }
        assert_eq!(world.nri.state().0.len(), 0);
        assert!(world.nri.round().await.is_idle());
        // A second runtime does not take the socket away.
        let other = Nri::new(world.nri.0.config.clone());
        other.start(Arc::new(TestNode::default())).await;
        assert!(other.state().1.unwrap().contains("nri_socket"));
        other.stop().await;
        assert!(world.socket.exists());
    }))
    .await;
}
