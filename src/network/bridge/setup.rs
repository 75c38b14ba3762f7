//! The host's side that all pods share: bridge, gateway addresses, forwarding, rules. Made with the first
//! pod, mended when it is found incomplete, taken away when no pod is left and that is asked for.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::PoisonError;

use serde_json::json;

use crate::network::addresses::{check_pool, gateway};
use crate::network::bridge::forwarding::{self, Families, Forwarding};
use crate::network::bridge::links::Link;
use crate::network::bridge::routes::{Route, default_mtu, overlapping};
use crate::network::bridge::worker::{Worker, pool_key};
use crate::network::cidr::{Cidr, IpFamily};
use crate::network::error::{NetworkError, Result};
use crate::store::Durability;

/// Marks a bridge as made by us, so that nobody else's is ever deleted.
const ALIAS: &str = "made by berth, deleted with its last pod on request";
const POD_CIDR: &str = "pod-cidr";

/// What pods need to know of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct SetUp {
    /// Number of the bridge.
    pub(super) bridge: u32,
    /// Largest packet in bytes.
    pub(super) mtu: u32,
}

impl Worker {
    /// Takes the pools of the last `UpdateRuntimeConfig`, else of the configuration.
    ///
    /// # Errors
    ///
    /// A range is unfit, or the settings cannot be read.
    pub(super) fn choose_pools(&mut self) -> Result<()> {
        let given = self.settings.load_all()?.records;
        let given = given.into_iter().find(|(key, _pools)| key == POD_CIDR);
        let pools: Vec<Cidr> = match given {
            Some((_key, pools)) => pools,
            None => {
                let config = &self.config;
                config
                    .ipv4_pool
                    .into_iter()
                    .chain(config.ipv6_pool)
                    .collect()
            }
        };
        for pool in &pools {
            check_pool(pool).map_err(|why| NetworkError::UnfitPool { cidr: *pool, why })?;
        }
        self.addresses.replace_pools(usable(pools));
        Ok(())
    }

    /// Looks, without changing anything, whether pods could be attached; for `Status`.
    pub(super) fn check(&mut self) {
        let pools: Vec<_> = self.addresses.pools().collect();
        let found = self.survey(&pools).map(|_seen| ());
        self.note(&found);
        self.unused_cni = unused_cni(&self.config.cni_config_dir);
        if let Some(path) = &self.unused_cni {
            tracing::warn!(
                path,
                "a CNI configuration lies unused: pods get berth's own network"
            );
        }
        self.publish();
    }

    fn note(&self, found: &Result<()>) {
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        shared.trouble = found.as_ref().err().map(Self::trouble);
    }

    /// The links and routes, once it is sure that no pool overlaps a route.
    fn survey(&mut self, pools: &[Cidr]) -> Result<(Vec<Link>, Vec<Route>)> {
        if pools.is_empty() {
            let why = match self.config.ipv6_pool {
                Some(_) if !forwarding::has_ipv6() => {
                    " (IPv6 is switched off on this host, so only the first counts)"
                }
                _ => "",
            };
            return Err(NetworkError::NoPool { why });
        }
        let links = self
            .links
            .list()
            .map_err(NetworkError::kernel("list", "the links"))?;
        let routes = self
            .links
            .routes()
            .map_err(NetworkError::kernel("list", "the routes"))?;
        refuse_overlap(pools, &links, &routes, &self.config.bridge)?;
        Ok((links, routes))
    }

    /// Makes whatever is missing; once it is done it costs nothing.
    pub(super) fn set_up(&mut self) -> Result<()> {
        if self.set_up.is_some() {
            return Ok(());
        }
        let made = self.make();
        self.note(&made);
        self.publish();
        made
    }

    fn make(&mut self) -> Result<()> {
        let pools: Vec<_> = self.addresses.pools().collect();
        let (links, routes) = self.survey(&pools)?;
        let name = self.config.bridge.clone();
        let found = links.iter().find(|l| l.name == name);
        let index = match found {
            Some(link) if link.kind == "bridge" => link.index,
            Some(link) => {
                return Err(NetworkError::NotABridge {
                    name,
                    kind: link.kind.clone(),
                });
            }
            None => self.make_bridge(&name)?,
        };
        self.join_links(index, &links)?;
        let has = |family| pools.iter().any(|p| p.family() == family);
        let families = Families {
            v4: has(IpFamily::V4),
            v6: has(IpFamily::V6),
        };
        Forwarding::open(&self.config.shared, &name)?.enable(families)?;
        if families.v4 {
            // A connection from 127.0.0.1 to a host port leaves by the bridge; rules guard the way in.
            forwarding::write(&format!("ipv4/conf/{name}/route_localnet"), "1")?;
        }
        if families.v6 {
            forwarding::write(&format!("ipv6/conf/{name}/accept_dad"), "0")?;
            forwarding::write(&format!("ipv6/conf/{name}/accept_ra"), "0")?;
        }
        self.address_bridge(index, &name)?;
        self.links
            .set_up(index)
            .map_err(NetworkError::kernel("set up the bridge", &*name))?;
        let (networks, forwards) = (self.networks(), self.all_forwards());
        self.table
            .replace(&networks, &forwards)
            .map_err(NetworkError::kernel("make the table", self.table.name()))?;
        self.look_at_firewall();
        let mtu = default_mtu(&routes, &links);
        tracing::info!(bridge = name, mtu, pools = ?pools, "pod network is set up");
        self.set_up = Some(SetUp { bridge: index, mtu });
        Ok(())
    }

    /// A chain of ours cannot accept what another drops: all that can be done is to say so.
    fn look_at_firewall(&mut self) {
        let dropping = self.table.dropping().unwrap_or_default();
        if dropping != self.dropping && !dropping.is_empty() {
            tracing::warn!(
                chains = ?dropping,
                "the host's firewall drops what is forwarded unless it accepts the bridge"
            );
        }
        self.dropping = dropping;
    }

    fn make_bridge(&mut self, name: &str) -> Result<u32> {
        let failed = |refusal| NetworkError::kernel("make the bridge", name)(refusal);
        let mut mac = [0xbe_u8, 0x00, 0, 0, 0, 0];
        for (place, byte) in name.bytes().enumerate() {
            // Stable, and different for daemons side by side.
            mac[2 + place % 4] = mac[2 + place % 4].rotate_left(3) ^ byte;
        }
        self.links.make_bridge(name, mac, ALIAS).map_err(failed)?;
        let made = self.links.find(name).map_err(failed)?;
        Ok(made
            .ok_or_else(|| failed(rustix::io::Errno::NODEV.into()))?
            .index)
    }

    /// Pods whose bridge was deleted under them join the new one.
    fn join_links(&mut self, bridge: u32, links: &[Link]) -> Result<()> {
        for lease in self.held.values() {
            let name = lease.host_interface.as_str();
            let alone = |l: &&Link| l.name == name && l.master != Some(bridge);
            if !self.leaving.contains(&lease.pod) && links.iter().any(|l| alone(&l)) {
                self.links
                    .join(name, bridge)
                    .map_err(NetworkError::kernel("connect to the bridge", name))?;
            }
        }
        Ok(())
    }

    /// The networks pods have addresses in: the pools, and those of leases from pools given up since.
    fn networks(&self) -> Vec<Cidr> {
        let leased = self.held.values().flat_map(|lease| &lease.addresses);
        let leased = leased.map(|a| Cidr::new(a.address, a.prefix));
        let all: BTreeSet<_> = self.addresses.pools().chain(leased).collect();
        all.into_iter().collect()
    }

    /// Gives the bridge the gateway of each network and takes away what it has of others.
    fn address_bridge(&mut self, index: u32, name: &str) -> Result<()> {
        let failed = |refusal| NetworkError::kernel("address the bridge", name)(refusal);
        let wanted: Vec<_> = self
            .networks()
            .iter()
            .map(|net| (gateway(net), net.prefix()))
            .collect();
        let present = self.links.addresses(index).map_err(failed)?;
        for (address, prefix) in &wanted {
            if !present.contains(&(*address, *prefix)) {
                self.links
                    .add_address(index, *address, *prefix)
                    .map_err(failed)?;
            }
        }
        let ours = self.is_ours()?;
        for (address, prefix) in present {
            let link_local =
                matches!(address, std::net::IpAddr::V6(a) if a.is_unicast_link_local());
            if ours && !link_local && !wanted.contains(&(address, prefix)) {
                self.links
                    .delete_address(index, address, prefix)
                    .map_err(failed)?;
            }
        }
        Ok(())
    }

    fn is_ours(&mut self) -> Result<bool> {
        let name = &self.config.bridge;
        let link = self
            .links
            .find(name)
            .map_err(NetworkError::kernel("look at", name))?;
        Ok(link.is_some_and(|l| l.kind == "bridge" && l.alias == ALIAS))
    }

    /// CRI: `UpdateRuntimeConfig`. Pods keep the addresses they have.
    pub(super) fn set_pod_cidr(&mut self, text: &str) -> Result<()> {
        let pools = parse_pod_cidr(text)?;
        if pools.is_empty() {
            return Ok(());
        }
        let new = usable(pools.clone());
        self.survey(&new)?;
        self.settings.put(POD_CIDR, &pools, Durability::Process)?;
        let before: Vec<_> = self.addresses.pools().collect();
        self.addresses.replace_pools(new);
        let after: Vec<_> = self.addresses.pools().collect();
        let changed = match self.set_up.take() {
            None => Ok(()),
            same if after == before => {
                self.set_up = same;
                Ok(())
            }
            Some(_old) => self.make(),
        };
        self.note(&changed);
        self.publish();
        changed
    }

    /// Removes what [`Worker::set_up`] made if no pod is left; `false`: somebody is just leaving, `idle`
    /// is told when that is done.
    pub(super) fn shutdown_if_unused(
        &mut self,
        idle: tokio::sync::oneshot::Sender<()>,
    ) -> Result<bool> {
        if !self.leaving.is_empty() {
            self.idle.push(idle);
            return Ok(false);
        }
        if self.held.is_empty() {
            self.tear_down()?;
            self.publish();
        }
        Ok(true)
    }

    /// Deletes table and bridge and puts the sysctls back. Every step is tried.
    pub(super) fn tear_down(&mut self) -> Result<()> {
        self.set_up = None;
        let name = self.config.bridge.clone();
        let table = self
            .table
            .delete()
            .map_err(NetworkError::kernel("delete the table", self.table.name()));
        let bridge = self.is_ours().and_then(|ours| {
            if !ours {
                return Ok(());
            }
            self.links
                .delete(&name)
                .map_err(NetworkError::kernel("delete the bridge", &*name))
        });
        let links = self.links.list().unwrap_or_default();
        let exists = |bridge: &str| links.iter().any(|l| l.name == bridge);
        let sysctls =
            Forwarding::open(&self.config.shared, &name).and_then(|record| record.disable(exists));
        table.and(bridge).and(sysctls)
    }

    /// Renews what is answered from memory.
    pub(super) fn publish(&self) {
        let pools: Vec<_> = self.addresses.pools().map(|p| p.to_string()).collect();
        let pods = self.held.len() - self.leaving.len();
        let info = json!({
            "provider": "bridge",
            "bridge": self.config.bridge,
            "table": self.table.name(),
            "pools": pools,
            "gateways": self.addresses.pools().map(|p| gateway(&p)).collect::<Vec<_>>(),
            "mtu": self.set_up.as_ref().map(|s| s.mtu),
            "setUp": self.set_up.is_some(),
            "pods": pods,
            "unusedCniConfig": self.unused_cni,
            "droppingChains": self.dropping,
            "hostPorts": "on every address of the host but [::1]",
        });
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        shared.info = info;
        shared.notices = self.notices();
    }

    fn notices(&self) -> Vec<String> {
        let cni = self.unused_cni.iter().map(|path| {
            format!("the CNI configuration {path} is not used: pods get berth's own network")
        });
        let firewall = self.dropping.iter().map(|chain| {
            format!(
                "the firewall chain {chain:?} drops what is forwarded: it must accept the link {}",
                self.config.bridge
            )
        });
        cni.chain(firewall).collect()
    }
}

/// Without IPv6 where the host has it switched off.
fn usable(pools: Vec<Cidr>) -> Vec<Cidr> {
    let ipv6 = forwarding::has_ipv6();
    let fits = |p: &Cidr| ipv6 || p.family() == IpFamily::V4;
    pools.into_iter().filter(fits).collect()
}

/// `10.0.0.0/16`, or two of different families with a comma; empty: nothing.
fn parse_pod_cidr(text: &str) -> Result<Vec<Cidr>> {
    let mut pools: Vec<Cidr> = vec![];
    for part in text.split(',').map(str::trim).filter(|p| !p.is_empty()) {
        let cidr: Cidr = part.parse().map_err(NetworkError::BadCidr)?;
        check_pool(&cidr).map_err(|why| NetworkError::UnfitPool { cidr, why })?;
        if pools.iter().any(|p| p.family() == cidr.family()) {
            return Err(NetworkError::TwoOfAFamily {
                text: text.chars().take(200).collect(),
                family: cidr.family(),
            });
        }
        pools.push(cidr);
    }
    Ok(pools)
}

fn refuse_overlap(pools: &[Cidr], links: &[Link], routes: &[Route], bridge: &str) -> Result<()> {
    let own = links.iter().find(|l| l.name == bridge).map(|l| l.index);
    for pool in pools {
        if let Some(route) = overlapping(pool, routes, own) {
            let link = links.iter().find(|l| Some(l.index) == route.link);
            return Err(NetworkError::Overlap {
                pool: *pool,
                route: route.destination,
                through: link.map_or_else(
                    || "which refuses or has several links".to_owned(),
                    |link| format!("through {}", link.name),
                ),
                key: pool_key(pool.family()),
            });
        }
    }
    Ok(())
}

/// The first CNI configuration in a directory, by name.
fn unused_cni(directory: &Path) -> Option<String> {
    let entries = std::fs::read_dir(directory).ok()?;
    let mut names: Vec<_> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let ending = path.extension().and_then(|e| e.to_str());
            matches!(ending, Some("conf" | "conflist" | "json"))
        })
        .collect();
    names.sort();
    Some(names.first()?.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::error::chain;

    #[test]
    fn pod_cidrs() {
        let show = |text: &str| {
            parse_pod_cidr(text).map(|l| l.iter().map(Cidr::to_string).collect::<Vec<_>>())
        };
        assert_eq!(show("").unwrap(), Vec::<String>::new());
        assert_eq!(show("10.1.2.3/16").unwrap(), ["10.1.0.0/16"]);
        assert_eq!(
            show("10.1.0.0/16, fd00::/64").unwrap(),
            ["10.1.0.0/16", "fd00::/64"]
        );
        for bad in [
            "x",
            "10.0.0.0",
            "10.0.0.0/8,10.1.0.0/16",
            "10.0.0.0/32",
            "127.0.0.0/8",
        ] {
            let error = show(bad).unwrap_err();
            let kind = crate::base::error::HasKind::kind(&error);
            assert_eq!(
                kind,
                crate::base::error::Kind::InvalidArgument,
                "{}",
                chain(&error)
            );
        }
    }
}
