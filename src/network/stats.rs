//! Counters of a pod's interfaces. Kernel: `/proc/<pid>/net/dev`, proc_pid_net(5).

use crate::base::stats::InterfaceStats;
use crate::network::bridge::links::POD_INTERFACE;
use crate::network::error::{NetworkError, Result};

/// Reads the counters that a process sees.
///
/// # Errors
///
/// [`NetworkError::System`]: the process is gone.
pub(crate) fn of_process(pid: u32) -> Result<Vec<InterfaceStats>> {
    let path = format!("/proc/{pid}/net/dev");
    let text = std::fs::read_to_string(&path).map_err(NetworkError::system("read", path))?;
    Ok(parse(&text))
}

/// The interfaces but the loopback, the default one first.
fn parse(text: &str) -> Vec<InterfaceStats> {
    let mut list: Vec<_> = text.lines().skip(2).filter_map(parse_line).collect();
    list.sort_by_key(|i| i.name != POD_INTERFACE);
    list
}

fn parse_line(line: &str) -> Option<InterfaceStats> {
    let (name, counters) = line.split_once(':')?;
    let counters: Vec<u64> = counters
        .split_ascii_whitespace()
        .map_while(|c| c.parse().ok())
        .collect();
    let name = name.trim();
    // Received: bytes packets errs drop fifo frame compressed multicast; then sent: the same first four.
    match counters[..] {
        [
            rx_bytes,
            rx_packets,
            rx_errors,
            rx_dropped,
            _,
            _,
            _,
            _,
            tx_bytes,
            tx_packets,
            tx_errors,
            tx_dropped,
            ..,
        ] if name != "lo" => Some(InterfaceStats {
            name: name.to_owned(),
            rx_bytes,
            rx_packets,
            rx_errors,
            rx_dropped,
            tx_bytes,
            tx_packets,
            tx_errors,
            tx_dropped,
        }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_format() {
        let text = "Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:     100       1    0    0    0     0          0         0      100       1    0    0    0     0       0          0
  net1:       5       6    7    8    0     0          0         0        9      10   11   12    0     0       0          0
  eth0:123456789012 2    3    4    0     0          0         0        5       6    7    8    0     0       0          0
 junk
";
        let list = parse(text);
        assert_eq!(
            list.iter().map(|i| &*i.name).collect::<Vec<_>>(),
            ["eth0", "net1"]
        );
        assert_eq!(list[0].rx_bytes, 123_456_789_012);
        assert_eq!(
            (list[1].rx_dropped, list[1].tx_bytes, list[1].tx_dropped),
            (8, 9, 12)
        );
        assert!(parse("").is_empty());
    }

    #[test]
    fn a_process_that_is_gone() {
        assert!(of_process(u32::MAX).is_err());
        of_process(std::process::id()).unwrap();
    }
}
