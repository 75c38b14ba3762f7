//! Connections that the kernel remembers. UDP has no end: a sender whose first packet came before its
//! port was forwarded, or went to a pod since gone, would keep that answer while it keeps sending.
//! See `linux/netfilter/nfnetlink_conntrack.h`.

use crate::base::pod::Protocol;
use crate::network::bridge::expressions::nfproto;
use crate::network::bridge::nftables::protocol_number;
use crate::network::cidr::IpFamily;
use crate::network::ports::Forward;
use crate::sys::netlink::{Attributed as _, Family, Message, Refusal, Socket, attribute};

/// Subsystem 1; `IPCTNL_MSG_CT_GET`, `IPCTNL_MSG_CT_DELETE`.
const GET: u16 = 0x0101;
const DELETE: u16 = 0x0102;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_ID: u16 = 12;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_DST_PORT: u16 = 3;
const NESTED: u16 = 0x8000;

/// What matters of a remembered connection.
#[derive(Debug, PartialEq, Eq)]
struct Flow {
    protocol: u8,
    /// Port that the first packet was sent to.
    port: u16,
}

/// Forgets every UDP flow to the forwarded ports, whoever answers: one that is in use is begun anew by
/// its next packet.
///
/// Reads the whole table: only called for pods with UDP ports.
///
/// # Errors
///
/// The kernel's refusal.
pub(super) fn flush(forwards: &[Forward]) -> Result<(), Refusal> {
    let udp: Vec<_> = forwards
        .iter()
        .filter(|f| f.protocol == Protocol::Udp)
        .collect();
    let mut socket = None;
    for family in [IpFamily::V4, IpFamily::V6] {
        let of_family = |f: &&&Forward| IpFamily::of(f.target) == family;
        let ports: Vec<_> = udp.iter().filter(of_family).map(|f| f.host_port).collect();
        if ports.is_empty() {
            continue;
        }
        let socket = match &mut socket {
            Some(socket) => socket,
            none => none.insert(Socket::open(Family::Netfilter)?),
        };
        let header = [nfproto(family), 0, 0, 0];
        for answer in socket.dump(&Message::new(GET, 0, &header))? {
            let attributes = answer.body.get(4..).unwrap_or_default();
            let wanted = read_flow(attributes).is_some_and(|flow| {
                flow.protocol == protocol_number(Protocol::Udp) && ports.contains(&flow.port)
            });
            let Some(tuple) = attribute(attributes, CTA_TUPLE_ORIG).filter(|_tuple| wanted) else {
                continue;
            };
            let mut delete = Message::new(DELETE, 0, &header).bytes(CTA_TUPLE_ORIG | NESTED, tuple);
            if let Some(id) = attribute(attributes, CTA_ID) {
                delete = delete.bytes(CTA_ID, id);
            }
            match socket.request(&[delete]) {
                Err(refused) if !refused.is(rustix::io::Errno::NOENT) => return Err(refused),
                _gone => {}
            }
        }
    }
    Ok(())
}

fn read_flow(attributes: &[u8]) -> Option<Flow> {
    let origin = attribute(attributes, CTA_TUPLE_ORIG)?;
    let transport = attribute(origin, CTA_TUPLE_PROTO)?;
    Some(Flow {
        protocol: *attribute(transport, CTA_PROTO_NUM)?.first()?,
        port: u16::from_be_bytes(*attribute(transport, CTA_PROTO_DST_PORT)?.first_chunk()?),
    })
}
