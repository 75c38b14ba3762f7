//! The user of a process, looked up in the container's own `/etc/passwd` and `/etc/group`: regular files of a bounded size,
//! opened inside the root. What those files say is data of the image: numbers are parsed strictly, a name is never a number
//! (CVE-2024-40635, CVE-2026-46680, CVE-2026-30892).

use std::os::fd::BorrowedFd;
use std::path::Path;

use crate::base::container::ProcessUser;
use crate::runtime::plan::{Fault, UserName, UserPlan};
use crate::sys::file;

const STAGE: &str = "user";
const MAX_FILE: usize = 10 * 1024 * 1024;
/// Most supplementary groups: more would not fit a report, and no user has them.
const MAX_GROUPS: usize = 8192;
/// Largest id that Kubernetes knows.
const MAX_ID: u32 = i32::MAX.unsigned_abs();

/// Longest home directory: no path is longer.
const MAX_HOME: usize = 4096;

/// Looks the user up in the root of a container that is being made. Never later: its processes may have written the files.
pub(super) fn look_up(root: BorrowedFd<'_>, plan: &UserPlan) -> Result<ProcessUser, Fault> {
    let passwd = read(root, "/etc/passwd")?;
    let by_name = matches!(plan.group, Some(UserName::Name(_)));
    let group = if by_name || plan.merge_image_groups {
        read(root, "/etc/group")?
    } else {
        Vec::new()
    };
    resolve(plan, &passwd, &group)
}

/// The user of the sandbox process, which has no image: all are numbers.
pub(super) fn of_numbers(plan: &UserPlan) -> Result<ProcessUser, Fault> {
    resolve(plan, b"", b"")
}

fn read(root: BorrowedFd<'_>, path: &str) -> Result<Vec<u8>, Fault> {
    match file::read_in(root, Path::new(path), MAX_FILE) {
        Ok(bytes) => Ok(bytes),
        Err(error) if is_absent(&error) => Ok(Vec::new()),
        Err(error) => Err(Fault::call(STAGE, "read a regular file", path, &error)),
    }
}

fn is_absent(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{NotADirectory, NotFound};
    matches!(error.kind(), NotFound | NotADirectory)
}

/// A decimal number without sign, blank or superfluous zero, at most 2147483647.
fn number(text: &[u8]) -> Option<u32> {
    let plain = match text {
        [b'0'] => true,
        [b'1'..=b'9', rest @ ..] => rest.len() < 10 && rest.iter().all(u8::is_ascii_digit),
        _ => false,
    };
    if !plain {
        return None;
    }
    let text = std::str::from_utf8(text).ok()?;
    text.parse().ok().filter(|id| *id <= MAX_ID)
}

struct PasswdLine<'a> {
    name: &'a [u8],
    uid: Option<u32>,
    gid: Option<u32>,
    home: &'a [u8],
}

fn passwd_lines(bytes: &[u8]) -> impl Iterator<Item = PasswdLine<'_>> {
    bytes.split(|byte| *byte == b'\n').filter_map(|line| {
        // name:password:uid:gid:gecos:home:shell
        let mut fields = line.split(|byte| *byte == b':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let uid = number(fields.nth(1)?);
        let gid = number(fields.next()?);
        let home = fields.nth(1).unwrap_or_default();
        Some(PasswdLine {
            name,
            uid,
            gid,
            home,
        })
    })
}

struct GroupLine<'a> {
    name: &'a [u8],
    gid: Option<u32>,
    members: &'a [u8],
}

fn group_lines(bytes: &[u8]) -> impl Iterator<Item = GroupLine<'_>> {
    bytes.split(|byte| *byte == b'\n').filter_map(|line| {
        // name:password:gid:member,member
        let mut fields = line.split(|byte| *byte == b':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let gid = number(fields.nth(1)?);
        let members = fields.next().unwrap_or_default();
        Some(GroupLine { name, gid, members })
    })
}

/// The pure part.
fn resolve(plan: &UserPlan, passwd: &[u8], group: &[u8]) -> Result<ProcessUser, Fault> {
    let bad = |what: String| Fault::check(STAGE, "look up", what);
    let line = match &plan.user {
        UserName::Id(id) => passwd_lines(passwd).find(|line| line.uid == Some(*id)),
        UserName::Name(name) => {
            let found = passwd_lines(passwd).find(|line| line.name == name.as_bytes());
            let missing = || bad(format!("user {name:?}: not in the image's /etc/passwd"));
            Some(found.ok_or_else(missing)?)
        }
    };
    let uid = match (&plan.user, &line) {
        (UserName::Id(id), _) => *id,
        (UserName::Name(name), line) => {
            let uid = line.as_ref().and_then(|line| line.uid);
            uid.ok_or_else(|| bad(format!("user {name:?}: bad id in the image's /etc/passwd")))?
        }
    };
    let gid = match (&plan.group, &line) {
        (Some(UserName::Id(id)), _) => *id,
        (Some(UserName::Name(name)), _) => {
            let found = group_lines(group).find(|line| line.name == name.as_bytes());
            let missing = || bad(format!("group {name:?}: not in the image's /etc/group"));
            let id = found.ok_or_else(missing)?.gid;
            id.ok_or_else(|| bad(format!("group {name:?}: bad id in the image's /etc/group")))?
        }
        (None, Some(line)) => {
            let name = String::from_utf8_lossy(line.name).into_owned();
            let missing = || {
                bad(format!(
                    "user {name:?}: bad group in the image's /etc/passwd"
                ))
            };
            line.gid.ok_or_else(missing)?
        }
        (None, None) => 0,
    };
    if uid > MAX_ID || gid > MAX_ID {
        return Err(bad(format!("id {uid}:{gid}: above {MAX_ID}")));
    }
    let mut groups = vec![gid];
    groups.extend(&plan.additional_groups);
    if let (true, Some(line)) = (plan.merge_image_groups, &line) {
        let lists = |group: &GroupLine<'_>| {
            let mut members = group.members.split(|byte| *byte == b',');
            members.any(|member| member == line.name)
        };
        groups.extend(group_lines(group).filter(lists).filter_map(|line| line.gid));
    }
    let mut seen = std::collections::BTreeSet::new();
    groups.retain(|id| seen.insert(*id));
    if groups.len() > MAX_GROUPS {
        return Err(bad(format!(
            "{} supplementary groups: at most {MAX_GROUPS}",
            groups.len()
        )));
    }
    let home = line.map(|line| line.home.to_vec());
    let home = home
        .filter(|home| home.first() == Some(&b'/') && home.len() <= MAX_HOME && !home.contains(&0));
    Ok(ProcessUser {
        uid,
        gid,
        groups,
        home: home.unwrap_or_else(|| b"/".to_vec()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/sh\n\
        # comment\n\
        app:x:1000:1001::/home/app:/bin/sh\n\
        1002:x:0:0::/:/bin/sh\n\
        big:x:4294967296:0::/:/bin/sh\n\
        minus:x:-1:0::/:\n\
        max:x:4294967295:0::/:\n\
        hex:x:0x0:0::/:\n\
        padded:x: 0:0::/:\n\
        zeros:x:000:0::/:\n\
        nogroup:x:77:abc::/:\n\
        relative:x:78:78::home:\n\
        short:x:79\n\
        second:x:1000:5::/second:\n";
    const GROUP: &[u8] = b"root:x:0:\nwheel:x:10:root,app\napps:x:1001:app\nextra:x:50:other,app\n\
        odd:x:99999999999:app\nprefix:x:60:application\n";

    fn plan(user: UserName) -> UserPlan {
        UserPlan {
            user,
            ..UserPlan::default()
        }
    }

    fn name(name: &str) -> UserName {
        UserName::Name(name.to_owned())
    }

    #[test]
    fn users() {
        let check = |user: UserName, want: Result<(u32, u32, &str), &str>| {
            let found = resolve(&plan(user.clone()), PASSWD, GROUP);
            match (found, want) {
                (Ok(found), Ok((uid, gid, home))) => {
                    assert_eq!((found.uid, found.gid), (uid, gid), "{user:?}");
                    assert_eq!(found.home, home.as_bytes(), "{user:?}");
                    assert_eq!(found.groups, [gid], "{user:?}");
                }
                (Err(fault), Err(text)) => {
                    assert!(fault.to_string().contains(text), "{user:?}: {fault}");
                }
                (found, want) => panic!("{user:?}: {found:?}, not {want:?}"),
            }
        };
        check(UserName::Id(0), Ok((0, 0, "/root")));
        check(UserName::Id(1000), Ok((1000, 1001, "/home/app")));
        check(UserName::Id(1002), Ok((1002, 0, "/")));
        check(UserName::Id(1), Ok((1, 0, "/")));
        check(UserName::Id(78), Ok((78, 78, "/")));
        check(UserName::Id(79), Ok((79, 0, "/")));
        check(name("app"), Ok((1000, 1001, "/home/app")));
        for bad in ["big", "minus", "max", "hex", "padded", "zeros"] {
            check(name(bad), Err("bad id"));
        }
        check(name("nogroup"), Err("bad group"));
        check(UserName::Id(77), Err("bad group"));
        check(name("none"), Err("not in the image's /etc/passwd"));
        check(name(""), Err("not in the image's /etc/passwd"));
        check(UserName::Id(u32::MAX), Err("above 2147483647"));
        check(UserName::Id(2_147_483_648), Err("above 2147483647"));
    }

    #[test]
    fn numbers_alone() {
        let mut sandbox = plan(UserName::Id(65_535));
        sandbox.additional_groups = vec![7, 2000];
        let found = of_numbers(&sandbox).unwrap();
        assert_eq!((found.uid, found.gid), (65_535, 0));
        assert_eq!(found.groups, [0, 7, 2000]);
        sandbox.group = Some(UserName::Id(2000));
        assert_eq!(of_numbers(&sandbox).unwrap().groups, [2000, 7]);
        assert!(of_numbers(&plan(name("app"))).is_err());
    }

    #[test]
    fn groups() {
        let mut app = plan(name("app"));
        app.additional_groups = vec![1001, 7, 7, 50];
        let found = resolve(&app, PASSWD, GROUP).unwrap();
        assert_eq!(found.groups, [1001, 7, 50]);
        app.merge_image_groups = true;
        let found = resolve(&app, PASSWD, GROUP).unwrap();
        assert_eq!(found.groups, [1001, 7, 50, 10]);
        app.group = Some(name("extra"));
        let found = resolve(&app, PASSWD, GROUP).unwrap();
        assert_eq!((found.gid, found.groups), (50, vec![50, 1001, 7, 10]));
        app.group = Some(name("odd"));
        let fault = resolve(&app, PASSWD, GROUP).unwrap_err();
        assert!(fault.to_string().contains("bad id"), "{fault}");
        app.group = Some(name("gone"));
        let fault = resolve(&app, PASSWD, GROUP).unwrap_err();
        assert!(fault.to_string().contains("/etc/group"), "{fault}");
        app.group = Some(UserName::Id(3));
        assert_eq!(resolve(&app, b"app:x:1:2:::\n", b"").unwrap().gid, 3);
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_taken(passwd: Vec<u8>, group: Vec<u8>, id: u32, text: String) {
            let mut plan = plan(UserName::Id(id));
            plan.merge_image_groups = true;
            let _either = resolve(&plan, &passwd, &group);
            plan.user = UserName::Name(text);
            let _either = resolve(&plan, &passwd, &group);
        }

        #[test]
        fn numbers_round_trip(id in 0..=MAX_ID) {
            assert_eq!(number(id.to_string().as_bytes()), Some(id));
        }
    }
}
