//! A registry for tests that does what it is told: serves, cuts, stalls, redirects, lies.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use crate::base::tasks::Tasks;
use crate::images::fixture::TestImage;

/// What was asked.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) query: String,
    pub(crate) headers: HashMap<String, String>,
    pub(crate) body: String,
}

impl Asked {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }
}

/// What is answered.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    /// Only so many bytes of the body are sent.
    pub(crate) cut: Option<usize>,
    /// After what was sent the connection stays open and silent.
    pub(crate) stall: bool,
}

impl Reply {
    pub(crate) fn ok(body: impl Into<Vec<u8>>) -> Self {
        Self {
            status: 200,
            body: body.into(),
            ..Self::default()
        }
    }

    pub(crate) fn status(status: u16) -> Self {
        Self {
            status,
            ..Self::default()
        }
    }

    pub(crate) fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    pub(crate) fn cut(mut self, at: usize) -> Self {
        self.cut = Some(at);
        self
    }

    pub(crate) fn stalled(mut self, at: usize) -> Self {
        (self.cut, self.stall) = (Some(at), true);
        self
    }
}

type Handler = Arc<dyn Fn(&Asked) -> Reply + Send + Sync>;

/// A registry on loopback; it ends with the runtime of the test.
#[derive(Clone)]
pub(crate) struct Liar {
    pub(crate) address: String,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl Liar {
    pub(crate) async fn start(handler: impl Fn(&Asked) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let asked = Arc::new(Mutex::new(vec![]));
        let (log, handler): (_, Handler) = (asked.clone(), Arc::new(handler));
        let tasks = Tasks::default();
        let others = tasks.clone();
        let _detached = tasks.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (log, handler) = (log.clone(), handler.clone());
                let _detached = others.spawn(async move {
                    let _ended = serve(stream, &log, &handler).await;
                });
            }
        });
        Self { address, asked }
    }

    /// Serves these images at `repository`, each under its tag.
    pub(crate) async fn serving(repository: &str, images: &[(&str, TestImage)]) -> Self {
        let contents = contents(repository, images);
        Self::start(move |asked| answer(&contents, asked)).await
    }

    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }

    /// How often a path with this in it was asked for.
    pub(crate) fn count(&self, part: &str) -> usize {
        self.asked()
            .iter()
            .filter(|asked| asked.path.contains(part))
            .count()
    }
}

/// What a registry has, by path.
pub(crate) type Contents = BTreeMap<String, Vec<u8>>;

pub(crate) fn contents(repository: &str, images: &[(&str, TestImage)]) -> Contents {
    let mut contents = Contents::new();
    for (tag, image) in images {
        let manifests = format!("/v2/{repository}/manifests");
        contents.insert(format!("{manifests}/{tag}"), image.manifest.clone());
        contents.insert(
            format!("{manifests}/{}", image.digest()),
            image.manifest.clone(),
        );
        for (digest, blob) in image.blobs() {
            contents.insert(format!("/v2/{repository}/blobs/{digest}"), blob);
        }
    }
    contents
}

/// As a registry in order would, ranges included.
pub(crate) fn answer(contents: &Contents, asked: &Asked) -> Reply {
    let Some(body) = contents.get(&asked.path) else {
        return Reply {
            status: 404,
            body: br#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}"#
                .to_vec(),
            ..Reply::default()
        };
    };
    let range = asked
        .header("range")
        .strip_prefix("bytes=")
        .and_then(|r| r.strip_suffix('-'));
    match range.and_then(|start| start.parse::<usize>().ok()) {
        Some(start) if start < body.len() => Reply {
            status: 206,
            body: body[start..].to_vec(),
            ..Reply::default()
        }
        .with(
            "Content-Range",
            format!("bytes {start}-{}/{}", body.len() - 1, body.len()),
        ),
        Some(_) => Reply::status(416),
        None => Reply::ok(body.clone()),
    }
}

async fn serve(
    mut stream: TcpStream,
    log: &Mutex<Vec<Asked>>,
    handler: &Handler,
) -> std::io::Result<()> {
    let mut buffer = vec![];
    loop {
        let end = loop {
            if let Some(end) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                break end;
            }
            if stream.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
        };
        let head = String::from_utf8_lossy(&buffer[..end]).into_owned();
        buffer.drain(..end + 4);
        let mut lines = head.lines();
        let mut first = lines.next().unwrap_or_default().split(' ');
        let (method, target) = (
            first.next().unwrap_or_default(),
            first.next().unwrap_or_default(),
        );
        let headers: HashMap<_, _> = lines
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
            .collect();
        let length = headers
            .get("content-length")
            .map_or(0, |text| text.parse().unwrap_or(0));
        while buffer.len() < length {
            stream.read_buf(&mut buffer).await?;
        }
        let body = buffer.drain(..length).collect();
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let asked = Asked {
            method: method.to_owned(),
            path: path.to_owned(),
            query: query.to_owned(),
            headers,
            body: String::from_utf8(body).unwrap_or_default(),
        };
        log.lock().unwrap().push(asked.clone());
        let reply = handler(&asked);
        let mut text = format!(
            "HTTP/1.1 {} X\r\nContent-Length: {}\r\n",
            reply.status,
            reply.body.len()
        );
        for (name, value) in &reply.headers {
            text.push_str(&format!("{name}: {value}\r\n"));
        }
        text.push_str("\r\n");
        stream.write_all(text.as_bytes()).await?;
        let sent = reply.cut.unwrap_or(reply.body.len()).min(reply.body.len());
        stream.write_all(&reply.body[..sent]).await?;
        stream.flush().await?;
        if reply.stall {
            // Until the client goes away.
            while stream.read_buf(&mut buffer).await? > 0 {}
            return Ok(());
        }
        if reply.cut.is_some() {
            return Ok(());
        }
    }
}
