//! The files that tell a pod its names: `resolv.conf`, `hosts`, `hostname`. Pure texts.

use std::fmt::Write as _;
use std::net::IpAddr;

use crate::base::error::{HasKind, Kind};
use crate::base::id::PodId;
use crate::base::pod::DnsConfig;

/// `HOST_NAME_MAX` of Linux, sethostname(2).
const LONGEST: usize = 64;

/// A host name that the kernel or a file format cannot take.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("hostname {name:?}: {why}")]
pub(crate) struct HostnameError {
    name: String,
    why: &'static str,
}

impl HasKind for HostnameError {
    fn kind(&self) -> Kind {
        Kind::InvalidArgument
    }
}

/// A pod's host name: the configured one, else the node's with the host's network, else the first 12
/// digits of the id.
///
/// CRI: `PodSandboxConfig.hostname`.
///
/// # Errors
///
/// It is longer than 64 bytes, or has characters no host name has.
pub(crate) fn hostname(
    configured: &str,
    pod: PodId,
    node: Option<&str>,
) -> Result<String, HostnameError> {
    if configured.is_empty() {
        return Ok(node.map_or_else(|| pod.0.short(), str::to_owned));
    }
    let bad = |why| HostnameError {
        name: configured.chars().take(LONGEST + 1).collect(),
        why,
    };
    if configured.len() > LONGEST {
        return Err(bad("at most 64 bytes"));
    }
    let fits = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_');
    if !configured.bytes().all(fits) || configured.starts_with(['-', '.']) {
        return Err(bad(
            "letters, digits, `-`, `.` and `_` only, and a letter or digit first",
        ));
    }
    Ok(configured.to_owned())
}

/// The text of `resolv.conf`: as configured, or the node's where nothing is. A configuration that is
/// present but empty asks for an empty file (`dnsPolicy: None`).
///
/// CRI: `PodSandboxConfig.dns_config`.
pub(crate) fn resolv_conf(config: Option<&DnsConfig>, host_text: &str) -> String {
    let Some(config) = config else {
        return host_text.to_owned();
    };
    let mut text = String::new();
    let mut line = |key: &str, words: &[String]| {
        if !words.is_empty() {
            let _never_fails = writeln!(text, "{key} {}", words.join(" ")).is_ok();
        }
    };
    line("search", &config.searches);
    for server in &config.servers {
        line("nameserver", std::slice::from_ref(server));
    }
    line("options", &config.options);
    text
}

/// Whether what is asked for can be written: a word with a line break would be a line of its own.
///
/// # Errors
///
/// The first word that cannot.
pub(crate) fn check(config: &DnsConfig) -> Result<(), BadDnsWord> {
    let lists = [
        ("servers", &config.servers),
        ("searches", &config.searches),
        ("options", &config.options),
    ];
    for (field, words) in lists {
        let bad = |word: &&String| {
            word.is_empty() || word.contains(|c: char| c.is_whitespace() || c.is_control())
        };
        if let Some(word) = words.iter().find(bad) {
            return Err(BadDnsWord {
                field,
                word: word.chars().take(80).collect(),
            });
        }
    }
    Ok(())
}

/// A word of the DNS configuration that no line can hold.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "dns_config.{field}: {word:?} is not one word: give each as an entry of its own, without spaces"
)]
pub(crate) struct BadDnsWord {
    field: &'static str,
    word: String,
}

impl HasKind for BadDnsWord {
    fn kind(&self) -> Kind {
        Kind::InvalidArgument
    }
}

/// The text of `hosts` for a pod with these addresses. (kubelet mounts a file of its own over it.)
pub(crate) fn hosts(hostname: &str, ips: &[IpAddr]) -> String {
    let mut text = String::from(
        "127.0.0.1\tlocalhost\n\
         ::1\tlocalhost ip6-localhost ip6-loopback\n\
         fe00::\tip6-localnet\n\
         ff02::1\tip6-allnodes\n\
         ff02::2\tip6-allrouters\n",
    );
    let short = hostname.split('.').next().unwrap_or(hostname);
    let names = if short == hostname {
        hostname.to_owned()
    } else {
        format!("{hostname}\t{short}")
    };
    for ip in ips {
        let _never_fails = writeln!(text, "{ip}\t{names}").is_ok();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::id::Id;

    fn words(list: &[&str]) -> Vec<String> {
        list.iter().map(|w| (*w).to_owned()).collect()
    }

    #[test]
    fn resolv_confs() {
        let host = "nameserver 192.0.2.53\n# mine\n";
        assert_eq!(resolv_conf(None, host), host);
        assert_eq!(resolv_conf(Some(&DnsConfig::default()), host), "");
        let config = DnsConfig {
            servers: words(&["10.96.0.10", "fd00::a"]),
            searches: words(&["default.svc.cluster.local", "cluster.local"]),
            options: words(&["ndots:5", "timeout:1"]),
        };
        assert_eq!(
            resolv_conf(Some(&config), host),
            "search default.svc.cluster.local cluster.local\nnameserver 10.96.0.10\n\
             nameserver fd00::a\noptions ndots:5 timeout:1\n"
        );
        check(&config).unwrap();
        for bad in ["", "a b", "a\nnameserver 6.6.6.6", "\u{7}"] {
            let config = DnsConfig {
                searches: words(&[bad]),
                ..DnsConfig::default()
            };
            assert!(check(&config).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn hostnames() {
        let pod = PodId(Id::from_bytes([0xab; 32]));
        assert_eq!(hostname("", pod, None).unwrap(), "abababababab");
        assert_eq!(hostname("", pod, Some("node")).unwrap(), "node");
        assert_eq!(hostname("web-0", pod, Some("node")).unwrap(), "web-0");
        let fqdn = format!("{}.local", "a".repeat(58));
        assert_eq!(hostname(&fqdn, pod, None).unwrap().len(), 64);
        for bad in [&*format!("{fqdn}x"), "a b", "a\n", "-a", ".a", "a/b", "ä"] {
            assert!(hostname(bad, pod, None).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn hosts_files() {
        let ips: Vec<IpAddr> = vec!["10.1.0.2".parse().unwrap(), "fd00::2".parse().unwrap()];
        let text = hosts("web-0.sub.local", &ips);
        assert!(text.starts_with("127.0.0.1\tlocalhost\n::1\t"));
        assert!(
            text.ends_with("10.1.0.2\tweb-0.sub.local\tweb-0\nfd00::2\tweb-0.sub.local\tweb-0\n")
        );
        assert!(hosts("web", &ips[..1]).ends_with("\n10.1.0.2\tweb\n"));
        assert!(!hosts("web", &[]).contains("web"));
    }
}
