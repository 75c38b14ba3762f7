//! The resctrl group of a container, out of what CDI devices and NRI plugins ask for.

use oci_spec::runtime as oci;

use crate::base::edits::{Edits, Rdt, RdtEdit};
use crate::runtime::resctrl::{self, Resctrl};
use crate::runtime::spec::error::{Result, SpecError};

/// The group, and the last that asks for it: (who, field). Absent: the root's, which every process is in.
///
/// # Errors
/// [`SpecError::Invalid`]: a name that no group can have, or a line that is two.
fn merged(all: &[Edits]) -> Result<Option<(Rdt, &str, &'static str)>> {
    let mut made: Option<(Rdt, &str, &'static str)> = None;
    for (by, field, edit) in all.iter().flat_map(|edits| {
        edits
            .rdt
            .iter()
            .map(|(field, edit)| (&*edits.by, *field, edit))
    }) {
        let old = made.take().map(|(rdt, ..)| rdt);
        let new = match edit {
            RdtEdit::Replace(rdt) => rdt.clone(),
            RdtEdit::Change {
                clos_id,
                schemata,
                enable_monitoring,
            } => {
                let old = old.unwrap_or_default();
                Some(Rdt {
                    clos_id: clos_id.clone().unwrap_or(old.clos_id),
                    schemata: schemata.clone().unwrap_or(old.schemata),
                    enable_monitoring: enable_monitoring.unwrap_or(old.enable_monitoring),
                    ..old
                })
            }
        };
        made = new
            .filter(|rdt| *rdt != Rdt::default())
            .map(|rdt| (rdt, by, field));
    }
    if let Some((rdt, by, field)) = &made {
        check(rdt, by, field)?;
    }
    Ok(made)
}

/// Directories that the kernel makes beside those of classes.
const RESERVED: [&str; 3] = ["info", "mon_data", "mon_groups"];

fn check(rdt: &Rdt, by: &str, field: &str) -> Result<()> {
    let class = &rdt.clos_id;
    let odd = class.contains(['/', '\n', '\0']) || matches!(&**class, "." | "..");
    if odd || RESERVED.contains(&&**class) || class.len() > 255 {
        let mend = "use the name of a directory";
        let problem = "is no name of a class";
        return Err(SpecError::invalid(
            format!("{by}: {field}"),
            class,
            problem,
            mend,
        ));
    }
    let lines = [
        ("l3CacheSchema", &rdt.l3_cache_schema),
        ("memBwSchema", &rdt.mem_bw_schema),
    ];
    let more = rdt.schemata.iter().map(|line| ("schemata", line));
    for (name, line) in lines.into_iter().chain(more) {
        if line.contains(['\n', '\0']) {
            let field = format!("{by}: {field}.{name}");
            let mend = "give each line as an entry";
            return Err(SpecError::invalid(field, line, "is more than a line", mend));
        }
    }
    Ok(())
}

/// The group that a container is to be in.
///
/// # Errors
/// [`SpecError::Invalid`]: a name that no group can have, or a line that is two.
pub(crate) fn of(all: &[Edits]) -> Result<Option<Rdt>> {
    Ok(merged(all)?.map(|(rdt, ..)| rdt))
}

/// Checks that the node has groups, if one is asked for. Looks at the mount.
///
/// # Errors
/// [`SpecError::Precondition`] names who asks, the field and its value.
pub(crate) fn check_mounted(all: &[Edits]) -> Result<()> {
    let Some((rdt, by, field)) = merged(all)?.filter(|_| Resctrl::find().is_none()) else {
        return Ok(());
    };
    let value = match (&*rdt.clos_id, rdt.schemata.join("; ")) {
        ("", schemata) => format!("{}{}{schemata}", rdt.l3_cache_schema, rdt.mem_bw_schema),
        (class, _) => class.to_owned(),
    };
    Err(SpecError::precondition(
        format!("{by}: {field}"),
        value,
        format!("cannot be had: no resctrl is mounted at {}", resctrl::ROOT),
        "mount it if the node's processors and kernel have it, or leave the field out",
    ))
}

/// As the OCI spec has it.
pub(super) fn describe(rdt: &Rdt) -> oci::LinuxIntelRdt {
    let text = |text: &String| (!text.is_empty()).then(|| text.clone());
    let mut made = oci::LinuxIntelRdt::default();
    made.set_clos_id(text(&rdt.clos_id))
        .set_schemata((!rdt.schemata.is_empty()).then(|| rdt.schemata.clone()))
        .set_l3_cache_schema(text(&rdt.l3_cache_schema))
        .set_mem_bw_schema(text(&rdt.mem_bw_schema))
        .set_enable_monitoring(rdt.enable_monitoring.then_some(true));
    made
}

#[cfg(test)]
mod tests {
    use super::*;

    fn edits(all: Vec<RdtEdit>) -> Edits {
        Edits {
            by: "NRI plugin 10-x".to_owned(),
            rdt: all.into_iter().map(|edit| ("rdt", edit)).collect(),
            ..Edits::default()
        }
    }

    fn class(name: &str) -> RdtEdit {
        RdtEdit::Change {
            clos_id: Some(name.to_owned()),
            schemata: None,
            enable_monitoring: None,
        }
    }

    #[test]
    fn later_edits_change_or_replace() {
        let first = edits(vec![RdtEdit::Replace(Some(Rdt {
            clos_id: "gold".to_owned(),
            mem_bw_schema: "MB:0=50".to_owned(),
            enable_monitoring: true,
            ..Rdt::default()
        }))]);
        let lines = RdtEdit::Change {
            clos_id: None,
            schemata: Some(vec!["L3:0=f".to_owned()]),
            enable_monitoring: Some(false),
        };
        let made = of(&[first.clone(), edits(vec![lines, class("tin")])])
            .unwrap()
            .unwrap();
        assert_eq!((&*made.clos_id, made.enable_monitoring), ("tin", false));
        assert_eq!((&*made.mem_bw_schema, made.schemata.len()), ("MB:0=50", 1));
        let spec = serde_json::to_value(describe(&made)).unwrap();
        let wanted =
            serde_json::json!({"closID": "tin", "schemata": ["L3:0=f"], "memBwSchema": "MB:0=50"});
        assert_eq!(spec, wanted);
        let none = edits(vec![RdtEdit::Replace(None)]);
        assert_eq!(of(&[first.clone(), none.clone()]).unwrap(), None);
        let anew = of(&[first, none, edits(vec![class("tin")])])
            .unwrap()
            .unwrap();
        assert_eq!((&*anew.clos_id, &*anew.mem_bw_schema), ("tin", ""));
        assert_eq!(of(&[edits(vec![class("")])]).unwrap(), None);
    }

    #[test]
    fn what_no_group_can_be() {
        let lines = RdtEdit::Change {
            clos_id: None,
            schemata: Some(vec!["L3:0=f\nMB:0=1".to_owned()]),
            enable_monitoring: None,
        };
        for edit in [
            class("a/b"),
            class(".."),
            class("a\n"),
            class("info"),
            class("mon_groups"),
            lines,
        ] {
            let error = of(&[edits(vec![edit])]).unwrap_err().to_string();
            assert!(error.starts_with("NRI plugin 10-x: rdt"), "{error}");
        }
    }
}
