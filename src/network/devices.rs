//! Network devices of the node that a container takes along. OCI runtime spec: `linux.netDevices`.

use std::net::IpAddr;
use std::os::fd::{AsFd as _, BorrowedFd};

use crate::base::edits::NetDevice;
use crate::network::bridge::links::Links;
use crate::network::error::{NetworkError, Result};
use crate::sys::netlink::Refusal;
use crate::sys::ns::in_netns;

/// A device that was moved into a pod, and what it needs to be as before.
#[derive(Debug)]
struct Moved {
    device: NetDevice,
    addresses: Vec<(IpAddr, u8)>,
}

/// Devices that were moved into a pod.
#[derive(Debug, Default)]
pub(crate) struct MovedDevices(Vec<Moved>);

/// Moves devices from this thread's network namespace into another, sets them up there and gives them
/// back the addresses that moving takes away. One that is not on the node, but in the pod under its new name, is
/// there since an earlier container of the pod, and stays. Devices are not moved back when their container ends: hardware
/// comes back with the end of the pod's namespace.
///
/// # Errors
///
/// [`NetworkError::NetDevice`]: it is nowhere, or its name is taken in the pod. [`NetworkError::Kernel`]. All are back on
/// the node then, as far as they can be.
pub(crate) fn take(netns: BorrowedFd<'_>, devices: &[NetDevice]) -> Result<MovedDevices> {
    let mut moved = MovedDevices::default();
    for device in devices {
        if let Err(error) = take_one(netns, device, &mut moved) {
            give_back(netns, moved);
            return Err(error);
        }
    }
    Ok(moved)
}

fn take_one(netns: BorrowedFd<'_>, device: &NetDevice, moved: &mut MovedDevices) -> Result<()> {
    let failed = |step| NetworkError::kernel(step, format!("network device {:?}", device.host));
    let mut links = Links::open().map_err(|error| failed("look for")(error.into()))?;
    let on_node = links.find(&device.host).map_err(failed("look for"))?;
    let in_pod = here(netns, || Links::open()?.find(&device.name)).map_err(failed("look for"))?;
    let problem = |problem| NetworkError::NetDevice {
        device: device.clone(),
        problem,
    };
    let link = match (on_node, in_pod) {
        (Some(link), None) => link,
        (None, Some(_)) => return Ok(()),
        (None, None) => return Err(problem("it is not on the node")),
        (Some(_), Some(_)) => return Err(problem("the pod has one of that name")),
    };
    let addresses = links
        .lasting_addresses(link.index)
        .map_err(failed("read the addresses of"))?;
    links
        .move_to(link.index, netns, &device.name)
        .map_err(failed("move"))?;
    moved.0.push(Moved {
        device: device.clone(),
        addresses: addresses.clone(),
    });
    here(netns, || restore(&device.name, &addresses)).map_err(failed("set up"))
}

/// Moves devices back to this thread's network namespace, up and with their addresses. What fails is logged.
pub(crate) fn give_back(netns: BorrowedFd<'_>, moved: MovedDevices) {
    let own = match std::fs::File::open("/proc/thread-self/ns/net") {
        Ok(own) => own,
        Err(error) => return tracing::error!(%error, ?moved, "network devices stay in the pod"),
    };
    for Moved { device, addresses } in moved.0.into_iter().rev() {
        let back = || {
            let mut links = Links::open()?;
            match links.find(&device.name)? {
                Some(link) => links.move_to(link.index, own.as_fd(), &device.host),
                None => Err(rustix::io::Errno::NODEV.into()),
            }
        };
        let done = here(netns, back).and_then(|()| restore(&device.host, &addresses));
        if let Err(error) = done {
            tracing::error!(%error, device = device.host, "network device not given back");
        }
    }
}

/// Sets a link of this thread's network namespace up, with these addresses.
fn restore(name: &str, addresses: &[(IpAddr, u8)]) -> std::result::Result<(), Refusal> {
    let mut links = Links::open()?;
    let link = links.find(name)?.ok_or(rustix::io::Errno::NODEV)?;
    for (address, prefix) in addresses {
        links.add_address(link.index, *address, *prefix)?;
    }
    links.set_up(link.index)
}

fn here<T: Send>(
    netns: BorrowedFd<'_>,
    work: impl FnOnce() -> std::result::Result<T, Refusal> + Send,
) -> std::result::Result<T, Refusal> {
    in_netns(netns, || Ok(work()))?
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::ns::new_netns;

    fn device(host: &str, name: &str) -> NetDevice {
        NetDevice {
            host: host.to_owned(),
            name: name.to_owned(),
        }
    }

    fn names() -> Vec<String> {
        let all = Links::open().unwrap().list().unwrap();
        all.into_iter().map(|link| link.name).collect()
    }

    /// A node with `vethaaaaaaaaaaa` (two addresses), whose peer `eth0` is elsewhere, and a pod.
    fn world(test: impl FnOnce(BorrowedFd<'_>) + Send) {
        let (node, pod, peer) = [(); 3].map(|()| new_netns().unwrap()).into();
        in_netns(node.as_fd(), || {
            let mut links = Links::open().unwrap();
            links.make_bridge("br", [2, 0, 0, 0, 0, 8], "").unwrap();
            let bridge = links.find("br").unwrap().unwrap().index;
            links
                .make_pair("data0", bridge, 1400, [2, 0, 0, 0, 0, 9], peer.as_fd())
                .unwrap();
            let index = links.find("data0").unwrap().unwrap().index;
            for address in ["192.0.2.7", "2001:db8::7"] {
                links
                    .add_address(index, address.parse().unwrap(), 24)
                    .unwrap();
            }
            test(pod.as_fd());
            Ok(())
        })
        .unwrap();
    }

    #[test]
    fn a_device_moves_with_its_addresses_and_comes_back() {
        world(|pod| {
            let addresses = |name: &str| {
                let mut links = Links::open().unwrap();
                let link = links.find(name).unwrap().unwrap();
                let mut all = links.lasting_addresses(link.index).unwrap();
                all.sort_unstable();
                (link.mtu, all)
            };
            let before = addresses("data0");
            assert_eq!(before.1.len(), 2);
            let wanted = [device("data0", "net1")];
            let moved = take(pod, &wanted).unwrap();
            assert!(!names().contains(&"data0".to_owned()));
            assert_eq!(in_netns(pod, || Ok(addresses("net1"))).unwrap(), before);
            // A second container of the pod finds it there.
            assert!(take(pod, &wanted).unwrap().0.is_empty());
            give_back(pod, moved);
            assert_eq!(addresses("data0"), before);
            assert_eq!(in_netns(pod, || Ok(names())).unwrap(), ["lo"]);
        });
    }

    #[test]
    fn one_that_cannot_be_moved_leaves_all_on_the_node() {
        world(|pod| {
            let before = names();
            for (last, why) in [
                (device("none0", "net2"), "not on the node"),
                (device("br", "lo"), "one of that name"),
            ] {
                let error = take(pod, &[device("data0", "net1"), last]).unwrap_err();
                assert!(error.to_string().contains(why), "{error}");
                assert_eq!(names().len(), before.len());
                assert_eq!(in_netns(pod, || Ok(names())).unwrap(), ["lo"]);
            }
        });
    }
}
