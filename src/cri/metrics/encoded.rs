//! Metrics as they go over the wire, written once: a reply of 50 pods has some thousand values with the
//! same labels again and again, and a tree of strings for it costs more than to read the figures.

use prost::DecodeError;
use prost::bytes::{Buf, BufMut};
use prost::encoding::{self, DecodeContext, WireType, encode_varint, encoded_len_varint};

use crate::cri::metrics::Descriptor;

/// A `PodSandboxMetrics` with its parts, encoded. `build.rs` puts it in the place of the generated messages.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Encoded(Vec<u8>);

// Fields of the messages.
const POD_ID: u32 = 1;
const POD_METRICS: u32 = 2;
const POD_CONTAINERS: u32 = 3;
const CONTAINER_ID: u32 = 1;
const CONTAINER_METRICS: u32 = 2;
const METRIC_NAME: u32 = 1;
const METRIC_TIMESTAMP: u32 = 2;
const METRIC_TYPE: u32 = 3;
const METRIC_LABEL: u32 = 4;
const METRIC_VALUE: u32 = 5;
const VALUE_VALUE: u32 = 1;

/// All field numbers are below 16: key and wire type take one byte.
fn key(field: u32, kind: WireType, out: &mut Vec<u8>) {
    encoding::encode_key(field, kind, out);
}

fn text(field: u32, text: &str, out: &mut Vec<u8>) {
    key(field, WireType::LengthDelimited, out);
    encode_varint(text.len() as u64, out);
    out.extend_from_slice(text.as_bytes());
}

fn text_len(text: &str) -> usize {
    1 + encoded_len_varint(text.len() as u64) + text.len()
}

fn number(field: u32, number: u64, out: &mut Vec<u8>) {
    key(field, WireType::Varint, out);
    encode_varint(number, out);
}

fn number_len(number: u64) -> usize {
    1 + encoded_len_varint(number)
}

/// Writes the metrics of one pod: its own, then those of its containers.
#[derive(Debug)]
pub(super) struct Writer {
    out: Vec<u8>,
    /// The container that is being written; empty: the pod.
    container: Option<Vec<u8>>,
    labels: Vec<u8>,
    timestamp: i64,
}

impl Writer {
    /// For the pod of this id.
    pub(super) fn new(pod: &str) -> Self {
        let mut out = Vec::with_capacity(16 * 1024);
        text(POD_ID, pod, &mut out);
        Self {
            out,
            container: None,
            labels: vec![],
            timestamp: 0,
        }
    }

    /// What comes now has these values of the common labels and this time, in nanoseconds since 1970.
    pub(super) fn labels(&mut self, common: [&str; 6], timestamp: i64) {
        self.labels.clear();
        for value in common {
            text(METRIC_LABEL, value, &mut self.labels);
        }
        self.timestamp = timestamp;
    }

    /// What comes now is of this container.
    pub(super) fn container(&mut self, id: &str) {
        self.close();
        let mut out = Vec::with_capacity(32 * 1024);
        text(CONTAINER_ID, id, &mut out);
        self.container = Some(out);
    }

    /// One value; `extra`: of the labels after the common ones. Nothing where there is none.
    pub(super) fn put(&mut self, metric: &Descriptor, extra: &[&str], value: Option<u64>) {
        debug_assert_eq!(extra.len(), metric.labels.len(), "{}", metric.name);
        let Some(value) = value else { return };
        let timestamp = self.timestamp.cast_unsigned();
        let kind = u64::from((metric.kind as i32).cast_unsigned());
        let inner = if value == 0 { 0 } else { number_len(value) };
        let length = text_len(metric.name)
            + number_len(timestamp)
            + if kind == 0 { 0 } else { number_len(kind) }
            + self.labels.len()
            + extra.iter().map(|label| text_len(label)).sum::<usize>()
            + 2
            + inner;
        let (field, out) = match &mut self.container {
            Some(out) => (CONTAINER_METRICS, out),
            None => (POD_METRICS, &mut self.out),
        };
        key(field, WireType::LengthDelimited, out);
        encode_varint(length as u64, out);
        text(METRIC_NAME, metric.name, out);
        number(METRIC_TIMESTAMP, timestamp, out);
        if kind != 0 {
            number(METRIC_TYPE, kind, out);
        }
        out.extend_from_slice(&self.labels);
        for label in extra {
            text(METRIC_LABEL, label, out);
        }
        key(METRIC_VALUE, WireType::LengthDelimited, out);
        encode_varint(inner as u64, out);
        if value != 0 {
            number(VALUE_VALUE, value, out);
        }
    }

    fn close(&mut self) {
        if let Some(container) = self.container.take() {
            key(POD_CONTAINERS, WireType::LengthDelimited, &mut self.out);
            encode_varint(container.len() as u64, &mut self.out);
            self.out.extend_from_slice(&container);
        }
    }

    /// All of it.
    pub(super) fn finish(mut self) -> Encoded {
        self.close();
        Encoded(self.out)
    }
}

impl prost::Message for Encoded {
    fn encode_raw(&self, buf: &mut impl BufMut) {
        buf.put_slice(&self.0);
    }

    /// Keeps the field as it came.
    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: WireType,
        buf: &mut impl Buf,
        _: DecodeContext,
    ) -> Result<(), DecodeError> {
        let kept = &mut self.0;
        match wire_type {
            WireType::Varint => {
                let value = encoding::decode_varint(buf)?;
                number(tag, value, kept);
            }
            _ => {
                let mut bytes: Vec<u8> = vec![];
                encoding::bytes::merge(wire_type, &mut bytes, buf, DecodeContext::default())?;
                key(tag, wire_type, kept);
                encode_varint(bytes.len() as u64, kept);
                kept.extend_from_slice(&bytes);
            }
        }
        Ok(())
    }

    fn encoded_len(&self) -> usize {
        self.0.len()
    }

    fn clear(&mut self) {
        self.0.clear();
    }
}
