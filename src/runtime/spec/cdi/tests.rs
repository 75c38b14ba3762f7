//! CDI files and what becomes of them.

use super::*;

const JSON: &str = r#"{
    "cdiVersion": "0.6.0", "kind": "vendor.com/gpu", "annotations": {"a": "b"},
    "containerEdits": {"env": ["ALL=1"]},
    "devices": [
        {"name": "0", "containerEdits": {
            "env": ["GPU=0", "EMPTY="],
            "deviceNodes": [{"path": "/dev/gpu0", "hostPath": "/dev/null", "permissions": "rw"}],
            "mounts": [{"hostPath": "/lib", "containerPath": "/gpu/lib", "options": ["ro", "rbind"]}]}},
        {"name": "1", "containerEdits": {"deviceNodes": [
            {"path": "/dev/x", "type": "c", "major": 195, "minor": 1, "fileMode": 432, "permissions": "none"}]}}
    ]
}"#;

const YAML: &str = "
cdiVersion: '0.5.0'
kind: vendor.com/net
devices:
  - name: nic-0
    containerEdits:
      deviceNodes:
        - path: /dev/zero
          fileMode: 0640
          uid: 7
";

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn put(&self, name: &str, text: &str) -> &Self {
        let path = self.0.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::io::Write::write_all(&mut fs::File::create(path).unwrap(), text.as_bytes()).unwrap();
        self
    }

    fn files(&self) -> Files {
        Files::load(&[
            self.0.path().join("static"),
            self.0.path().join("missing"),
            self.0.path().join("run"),
        ])
    }

    fn resolve(&self, names: &[&str]) -> std::result::Result<Vec<Edits>, String> {
        let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
        resolve(&names, &self.files()).map_err(|error| crate::base::error::chain(&error))
    }
}

#[test]
fn devices_of_json_and_yaml() {
    let place = Place::new();
    place
        .put("static/gpu.json", JSON)
        .put("run/net.yaml", YAML)
        .put("static/notes.txt", "no CDI");
    let names = [
        "vendor.com/gpu=0",
        "vendor.com/gpu=1",
        "vendor.com/net=nic-0",
    ];
    let edits = place.resolve(&names).unwrap();
    let env: Vec<_> = edits.iter().flat_map(|one| one.env.clone()).collect();
    let some = |text: &str| Some(text.to_owned());
    // What is said for all devices of a file comes once.
    assert_eq!(
        env,
        [
            ("ALL".to_owned(), some("1")),
            ("GPU".to_owned(), some("0")),
            ("EMPTY".to_owned(), some("")),
        ]
    );
    let devices: Vec<_> = edits.iter().flat_map(|one| one.devices.clone()).collect();
    let [null, described, zero] = &devices[..] else {
        panic!("{devices:?}")
    };
    assert_eq!((&*null.path, &*null.host_path), ("/dev/gpu0", "/dev/null"));
    assert_eq!((null.major, null.minor, &*null.kind), (1, 3, "c"));
    assert_eq!((null.mode, &*null.access), (Some(0o666), "rw"));
    assert_eq!((described.major, described.minor), (195, 1));
    assert_eq!((described.mode, &*described.access), (Some(0o660), ""));
    assert_eq!((zero.major, zero.minor), (1, 5));
    assert_eq!(
        (zero.mode, zero.uid, &*zero.access),
        (Some(0o640), Some(7), "rwm")
    );
    let mount = &edits[1].mounts[0];
    assert_eq!((&*mount.source, &*mount.destination), ("/lib", "/gpu/lib"));
    assert!(edits[1].by.contains("vendor.com/gpu=0") && edits[1].by.ends_with("static/gpu.json"));
}

#[test]
fn a_resctrl_group_of_a_file() {
    let place = Place::new();
    place.put(
        "run/cache.yaml",
        "
cdiVersion: '1.1.0'
kind: vendor.com/cache
devices:
  - name: big
    containerEdits:
      intelRdt: {closID: gold, memBwSchema: 'MB:0=50', schemata: ['L3:0=f'], enableMonitoring: true}
",
    );
    let edits = place.resolve(&["vendor.com/cache=big"]).unwrap();
    let group = Rdt {
        clos_id: "gold".to_owned(),
        schemata: vec!["L3:0=f".to_owned()],
        l3_cache_schema: String::new(),
        mem_bw_schema: "MB:0=50".to_owned(),
        enable_monitoring: true,
    };
    let wanted = ("intelRdt", RdtEdit::Replace(Some(group)));
    assert_eq!(edits.last().unwrap().rdt, [wanted]);
}

#[test]
fn a_later_directory_wins_and_a_changed_file_counts_at_once() {
    let place = Place::new();
    place.put("static/gpu.json", JSON);
    let env = |place: &Place| place.resolve(&["vendor.com/gpu=0"]).unwrap()[0].env[0].clone();
    assert_eq!(env(&place).1.unwrap(), "1");
    place.put("run/gpu.json", &JSON.replace("ALL=1", "ALL=2"));
    assert_eq!(env(&place).1.unwrap(), "2");
    place.put("run/gpu.json", &JSON.replace("ALL=1", "ALL=3"));
    assert_eq!(env(&place).1.unwrap(), "3");
    place.put("run/again.json", JSON);
    let error = place.resolve(&["vendor.com/gpu=0"]).unwrap_err();
    assert!(
        error.contains("again.json") && error.contains("run/gpu.json"),
        "{error}"
    );
}

#[test]
fn errors_name_the_device_and_the_file() {
    let place = Place::new();
    place
        .put("static/gpu.json", JSON)
        .put("run/bad.yaml", "cdiVersion: [");
    for (name, parts) in [
        (
            "vendor.com/gpu=7",
            ["vendor.com/gpu=7", "bad.yaml cannot be used"],
        ),
        ("other.com/gpu=0", ["other.com/gpu=0", "nor is its kind"]),
    ] {
        let error = place.resolve(&[name]).unwrap_err();
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        assert!(
            error.contains("/static") && error.contains("/run"),
            "{error}"
        );
    }
    place.put(
        "run/gone.json",
        &JSON
            .replace("/dev/null", "/dev/gone")
            .replace("gpu\"", "tpu\""),
    );
    let error = place.resolve(&["vendor.com/tpu=0"]).unwrap_err();
    for part in [
        "vendor.com/tpu=0",
        "run/gone.json",
        "deviceNodes[/dev/gpu0]",
        "/dev/gone",
    ] {
        assert!(error.contains(part), "{part}: {error}");
    }
    // The file's other devices can be had.
    assert!(place.resolve(&["vendor.com/tpu=1"]).is_ok());
}

#[test]
fn what_a_file_must_keep_to() {
    let read = |change: (&str, &str)| {
        assert!(JSON.contains(change.0), "{change:?}");
        file::from_json(&JSON.replacen(change.0, change.1, 1)).map(drop)
    };
    assert_eq!(read(("{", "{")), Ok(()));
    assert_eq!(read(("0.6.0", "1.1.0")), Ok(()));
    assert_eq!(read(("0.6.0", "v0.6.0")), Ok(()));
    for (from, to, part) in [
        ("0.6.0", "0.5.0", "at least 0.6.0"),
        ("0.6.0", "9.9.9", "cdiVersion"),
        ("0.6.0", "0.6.1", "cdiVersion"),
        ("0.6.0", "", "cdiVersion"),
        ("vendor.com/gpu", "vendor.com", "kind"),
        ("vendor.com/gpu", "vendor.com/g/u", "kind"),
        ("\"annotations\"", "\"unheard\"", "unheard"),
        (
            "\"1\", \"containerEdits\"",
            "\"0\", \"containerEdits\"",
            "two",
        ),
        ("\"0\"", "\"-0\"", "name"),
        ("GPU=0", "GPU", "env[0]"),
        ("\"/dev/gpu0\"", "\"gpu0\"", "deviceNodes[0].path"),
        ("\"rw\"", "\"rx\"", "permissions"),
        ("\"c\"", "\"x\"", "type"),
        ("\"/gpu/lib\"", "\"gpu\"", "containerPath"),
        (
            "[\"ALL=1\"]",
            "[], \"additionalGids\": [5]",
            "at least 0.7.0",
        ),
        (
            "[\"ALL=1\"]",
            "[], \"hooks\": [{\"hookName\": \"x\", \"path\": \"/x\"}]",
            "hookName",
        ),
        (
            "[\"ALL=1\"]",
            "[], \"hooks\": [{\"hookName\": \"poststop\", \"path\": \"x\"}]",
            "path",
        ),
        (
            "[\"ALL=1\"]",
            "[], \"netDevices\": [{\"hostInterfaceName\": \"a\", \"name\": \"b\"}]",
            "1.1.0",
        ),
    ] {
        let error = read((from, to)).unwrap_err();
        assert!(error.contains(part), "{to}: {error}");
    }
}

#[test]
fn names_from_field_and_annotations() {
    let annotations = |pairs: &[(&str, &str)]| {
        pairs
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect()
    };
    let field = [
        "v.com/a=1".to_owned(),
        "v.com/a=2".to_owned(),
        "v.com/a=1".to_owned(),
    ];
    let given = annotations(&[
        ("cdi.k8s.io/x", "v.com/b=x,v.com/a=2"),
        ("other/key", "junk"),
    ]);
    assert_eq!(
        names(&field, &given).unwrap(),
        ["v.com/a=1", "v.com/a=2", "v.com/b=x"]
    );
    for name in [
        "",
        "gpu",
        "v.com=1",
        "v.com/gpu",
        "v.com/gpu=",
        "=1",
        "/a=1",
        "v.com/a= 1",
    ] {
        let error = names(&[name.to_owned()], &annotations(&[])).unwrap_err();
        assert!(error.to_string().contains("CDI_devices"), "{error}");
    }
    let error = names(&[], &annotations(&[("cdi.k8s.io/x", "")])).unwrap_err();
    assert!(error.to_string().contains("cdi.k8s.io/x"), "{error}");
}
