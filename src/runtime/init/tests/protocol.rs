//! What comes over the control socket, and plans, are taken as hostile: any bytes are an answer (CVE-2021-43784).

use proptest::prelude::*;

use super::*;
use crate::sys::socket;

/// What `create::receive` makes of a packet.
fn received(packet: &[u8]) -> std::io::Result<Received> {
    let (ours, childs) = socket::pair().unwrap();
    socket::send(childs.as_fd(), packet, &[]).unwrap();
    create::receive(ours.as_fd())
}

fn reports() -> [Report; 5] {
    [
        Report::Ready(known(1000, 1001, "/home/app")),
        Report::Mounted,
        Report::Done,
        Report::Moved { pid: 7 },
        Report::Failed(Fault::check("exec", "execve", "x")),
    ]
}

proptest! {
    #[test]
    fn any_packet_is_a_report_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 1..300)) {
        if let Ok(Received::Moved { .. } | Received::Closed) = received(&bytes) {
            prop_assert!(false, "without a descriptor nobody has moved, and a packet is no end");
        }
    }

    #[test]
    fn a_changed_byte_is_a_report_or_an_error(which in 0_usize..5, at in 0_usize..100, value: u8, cut in 0_usize..100) {
        let mut packet = postcard::to_allocvec(&reports()[which]).unwrap();
        let at = at % packet.len();
        packet[at] = value;
        let _either = received(&packet);
        packet.truncate((cut % packet.len()).max(1));
        let _either = received(&packet);
    }

    #[test]
    fn any_bytes_are_a_plan_or_an_error(at in 0_usize..4000, value: u8, cut in 0_usize..4000) {
        let image = Image { base: tempfile::tempdir().unwrap() };
        let mut bytes = plan(&image, "true").encode().unwrap();
        let at = at % bytes.len();
        bytes[at] = value;
        for length in [bytes.len(), cut % bytes.len()] {
            if let Ok((_, rest)) = Preamble::decode(&bytes[..length]) {
                let _either = postcard::from_bytes::<Plan>(rest);
            }
        }
    }
}

/// Lengths that say more than there is, as large as a number can be: no memory is taken for them.
#[test]
fn a_length_that_is_too_large_takes_no_memory() {
    for report in [
        Report::Ready(known(0, 0, "/")),
        Report::Failed(Fault::check("a", "b", "c")),
    ] {
        let packet = postcard::to_allocvec(&report).unwrap();
        for at in 1..packet.len() {
            let mut forged = packet[..at].to_vec();
            forged.extend([0xff; 9]);
            forged.push(0x01);
            if let Ok(Received::Report(read, _)) = received(&forged) {
                assert!(format!("{read:?}").len() < 4096);
            }
        }
    }
    // Larger than any report: cut, and so none.
    assert!(received(&vec![0xff; create::MAX_REPORT + 1]).is_err());
}
