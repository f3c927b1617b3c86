//! The file, the command line and the annotated example.

use tunnelfs_settings::{args, load, Cache, Kind, Loader, Settings, WORDS};

const ALL: &[&str] = &["transport", "wait", "host"];

fn from(file: &str, line: &[&str]) -> Result<Settings, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tunnelfs.toml");
    std::fs::write(&path, file).unwrap();
    let command = clap::Command::new("test").args(args(ALL));
    let words = ["test", "--config", path.to_str().unwrap()].into_iter().chain(line.iter().copied());
    let matches = command.try_get_matches_from(words).map_err(|e| e.to_string())?;
    load(ALL, &matches).and_then(Loader::finish_with_memory).map_err(|e| e.to_string())
}

#[test]
fn the_example_has_every_key_with_its_default() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/tunnelfs.toml");
    let text = std::fs::read_to_string(path).unwrap();
    assert_eq!(toml::from_str::<Settings>(&text).unwrap(), Settings::default());
    let table: toml::Table = toml::from_str(&text).unwrap();
    let defaults = toml::Table::try_from(Settings::default()).unwrap();
    for (section, keys) in &defaults {
        for key in keys.as_table().unwrap().keys() {
            assert!(table[section].get(key).is_some(), "{section}.{key} is not in the example");
            assert!(WORDS.iter().any(|w| w.key == format!("{section}.{key}")), "{section}.{key} has no option");
        }
    }
}

#[test]
fn the_command_line_goes_over_the_file_over_the_default() {
    let s = from("[transport]\nentries = 128\nslots = 8\n[host]\ncache = \"never\"", &["--slots", "16"]).unwrap();
    assert_eq!((s.transport.entries, s.transport.slots, s.transport.slot_size), (128, 16, 1 << 20));
    assert_eq!((s.host.cache, s.transport.kind), (Cache::Never, Kind::Ring));
    let s = from("", &["--cpus", "0,1", "--no-readdirplus", "--transport", "socket"]).unwrap();
    assert_eq!((&s.host.cpus[..], s.host.readdirplus, s.transport.kind), (&[0, 1][..], false, Kind::Socket));
}

#[test]
fn wrong_values_are_refused_with_key_value_allowed_and_origin() {
    let cases: &[(&str, &[&str], &[&str])] = &[
        ("[transport]\nqueues = 1\nentries = 48", &[], &["transport.entries = 48", "power of two", "tunnelfs.toml:3"]),
        ("", &["--entries", "48"], &["transport.entries = 48", "power of two", "--entries"]),
        ("", &["--entries", "16"], &["transport.slots = 32", "1 to entries (16)", "the default"]),
        ("[transport]\nslot_size = 33554432", &[], &["slot_size = 33554432", "16777216 bytes", "tunnelfs.toml:2"]),
        ("", &["--slot-size", "many"], &["slot_size = \"many\"", "u32", "--slot-size"]),
        ("", &["--num-request-queues", "63"], &["queues = 63", "0 to 62", "--num-request-queues"]),
        ("[transport]\nslotz = 3", &[], &["slotz", "unknown field", "line 2", "slots"]),
        ("[wat]", &[], &["wat", "unknown field", "transport"]),
        ("[host]\ncache = \"some\"", &[], &["some", "line 2", "metadata"]),
        ("", &["--cache", "some"], &["host.cache", "some", "metadata", "--cache"]),
        ("", &["--cpus", "0:x"], &["host.cpus", "x", "--cpus"]),
        ("", &["--tag", ""], &["host.tag", "1 to 36", "--tag"]),
        (
            "[transport]\nqueues = 60\nentries = 32768\nslots = 32768\nslot_size = 16777216",
            &[],
            &["slot_size = 16777216", "MiB of shared memory", "tunnelfs.toml:5"],
        ),
    ];
    for (file, line, parts) in cases {
        let error = from(file, line).unwrap_err();
        for part in *parts {
            assert!(error.contains(part), "`{error}` does not say `{part}`");
        }
    }
}

#[test]
fn words_of_mount() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t");
    std::fs::write(&path, "").unwrap();
    const MOUNT: &[&str] = &["transport", "mount"];
    let mut loader = Loader::new(Some(&path)).unwrap();
    for word in ["slots=4", "queues=3", "slot_size=65536", "huge_pages", "cpus=0:1", "noallow_other"] {
        assert!(loader.mount_word(MOUNT, word).unwrap(), "{word}");
    }
    assert!(!loader.mount_word(MOUNT, "nosuid").unwrap());
    assert!(loader.mount_word(MOUNT, "slots").is_err());
    assert!(loader.mount_word(MOUNT, "huge_pages=7").is_err());
    let s = loader.finish().unwrap();
    assert_eq!(
        (s.transport.slots, s.transport.queues, s.transport.slot_size, s.transport.huge_pages),
        (4, 3, 65536, true)
    );
    assert_eq!((&s.mount.cpus[..], s.mount.allow_other), (&[0, 1][..], false));
}

#[test]
fn a_missing_file_is_an_error_when_it_was_named() {
    assert!(Loader::new(Some("/nonexistent/t.toml".as_ref())).unwrap_err().to_string().contains("/nonexistent/t.toml"));
}
