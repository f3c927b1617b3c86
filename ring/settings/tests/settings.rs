//! The file, the command line and the annotated example.

use tunnelfs_settings::{args, load, Cache, Loader, Settings, TransportKind, OPTIONS};

const ALL: &[&str] = &["transport", "wait", "host"];

fn from(file: &str, line: &[&str]) -> Result<Settings, String> {
    from_file_and_line(ALL, file, line)
}

fn from_file_and_line(tables: &'static [&'static str], file: &str, line: &[&str]) -> Result<Settings, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tunnelfs.toml");
    std::fs::write(&path, file).unwrap();
    let command = clap::Command::new("test").args(args(tables));
    let words = ["test", "--config", path.to_str().unwrap()].into_iter().chain(line.iter().copied());
    let matches = command.try_get_matches_from(words).map_err(|e| e.to_string())?;
    load(tables, &matches).and_then(Loader::finish_with_memory).map_err(|e| e.to_string())
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
            assert!(OPTIONS.iter().any(|w| w.key == format!("{section}.{key}")), "{section}.{key} has no option");
        }
    }
}

#[test]
fn the_command_line_goes_over_the_file_over_the_default() {
    let s = from("[transport]\nentries = 128\nslots = 8\n[host]\ncache = \"never\"", &["--slots", "16"]).unwrap();
    assert_eq!((s.transport.entries, s.transport.slots, s.transport.slot_size), (128, 16, 1 << 20));
    assert_eq!((s.host.cache, s.transport.kind), (Cache::Never, TransportKind::Ring));
    let s = from("", &["--cpus", "0,0", "--no-readdirplus", "--transport", "socket"]).unwrap();
    assert_eq!((&s.host.cpus[..], s.host.readdirplus, s.transport.kind), (&[0, 0][..], false, TransportKind::Socket));
}

#[test]
fn wrong_values_are_refused_with_key_value_allowed_and_origin() {
    let cases: &[(&str, &[&str], &[&str])] = &[
        ("[transport]\nqueues = 1\nentries = 48", &[], &["transport.entries = 48", "power of two", "tunnelfs.toml:3"]),
        ("", &["--entries", "48"], &["transport.entries = 48", "power of two", "--entries"]),
        ("", &["--entries", "16"], &["transport.slots = 32", "1 to entries (16)", "the default"]),
        ("[transport]\nslot_size = 33554432", &[], &["slot_size = 33554432", "16777216 bytes", "tunnelfs.toml:2"]),
        ("", &["--slot-size", "many"], &["slot_size = \"many\"", "64k, 1M or 2MiB", "--slot-size"]),
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

/// Every key, with what cannot be: refused everywhere it can be written, with key, value, limit and origin.
#[test]
fn values_that_would_go_wrong_later_are_refused() {
    let long = format!("/{}", "x".repeat(107));
    let cases: &[(&str, &str, &str)] = &[
        ("transport.socket_path", "", "must be the path"),
        ("transport.socket_path", &long, "107 bytes, and this one has 108"),
        ("transport.socket_path", "/", "is a directory"),
        ("transport.queues", "63", "from 0 to 62"),
        ("transport.queues", "-1", "from 0 to 65535"),
        ("transport.queues", "65536", "from 0 to 65535"),
        ("transport.entries", "0", "power of two"),
        ("transport.entries", "1", "power of two"),
        ("transport.entries", "4294967295", "power of two"),
        ("transport.entries", "4294967296", "from 0 to 4294967295"),
        ("transport.entries", "99999999999999999999", "99999999999999999999"),
        ("transport.slots", "0", "1 to entries"),
        ("transport.slots", "4294967295", "1 to entries"),
        ("transport.slot_size", "0", "8192 to 16777216"),
        ("transport.slot_size", "1", "8192 to 16777216"),
        ("transport.slot_size", "4096", "8192 to 16777216"),
        ("transport.slot_size", "4294967295", "8192 to 16777216"),
        ("transport.slot_size", "-4096", "64k, 1M or 2MiB"),
        ("transport.slot_size", "1T", "64k, 1M or 2MiB"),
        ("transport.slot_size", "32M", "8192 to 16777216"),
        ("transport.slot_size", "18446744073709551616k", "64k, 1M or 2MiB"),
        ("wait.spin_us", "1000001", "from 0 to 1000000 microseconds"),
        ("wait.auto_us", "4294967295", "from 0 to 1000000 microseconds"),
        ("wait.auto_us", "4294967296", "from 0 to 4294967295"),
        ("host.tag", "", "1 to 36 bytes"),
        ("host.tag", "0123456789012345678901234567890123456", "1 to 36 bytes"),
        ("host.thread_pool_size", "1000000", "from 0 to 1024 threads"),
        ("host.thread_pool_size", "-1", "from 0 to"),
        ("host.cpus", "99999", "cannot run on CPU 99999; it can on"),
        ("host.cpus", "1023", "cannot run on CPU 1023; it can on"),
        ("host.cpus", "-1", "from 0 to"),
        ("host.rlimit_nofile", "9000000000000000000", "fs.nr_open"),
        ("host.rlimit_nofile", "9300000000000000000", "9300000000000000000"),
        ("mount.cpus", "99999", "cannot run on CPU 99999; it can on"),
        ("mount.tag", "0123456789012345678901234567890123456", "at most 36 bytes"),
        ("mount.timeout", "9223372036854775807", "from 0 to 31536000 seconds"),
        ("mount.timeout", "-1", "from 0 to"),
        ("mount.reconnect_timeout", "31536001", "from 0 to 31536000 seconds"),
    ];
    for &(key, value, allowed) in cases {
        let word = OPTIONS.iter().find(|w| w.key == key).unwrap();
        let option = format!("--{}", word.option);
        let on_line = from_tables(&["transport", "wait", word_table(key)], "", &[&format!("{option}={value}")]);
        assert_says(&on_line, &[key, value, allowed, &option]);

        let mut loader = Loader::new(Some("/dev/null".as_ref())).unwrap();
        let word = format!("{}={value}", key.split_once('.').unwrap().1);
        let tables = Box::leak(Box::new(["transport", "wait", word_table(key)]));
        let in_words = loader.mount_word(tables, &word).and_then(|known| {
            assert!(known, "{word}");
            loader.finish()
        });
        assert_says(&in_words.map_err(|e| e.to_string()), &[key, value, allowed, &format!("-o {word}")]);

        let (table, name) = key.split_once('.').unwrap();
        let quoted = value.parse::<i128>().is_err() || table == "host" && name == "tag" || key == "mount.tag";
        let value_there = match name {
            "cpus" => format!("[{value}]"),
            _ if quoted => format!("{value:?}"),
            _ => value.into(),
        };
        let file = format!("[{table}]\n{name} = {value_there}");
        let in_file = from_tables(&["transport", "wait", word_table(key)], &file, &[]);
        assert_says(&in_file, &[name, value, "tunnelfs.toml"]);
    }
}

fn word_table(key: &str) -> &'static str {
    if key.starts_with("mount") {
        "mount"
    } else {
        "host"
    }
}

fn from_tables(tables: &[&'static str], file: &str, line: &[&str]) -> Result<Settings, String> {
    let tables: &'static [&'static str] = Box::leak(tables.to_vec().into_boxed_slice());
    from_file_and_line(tables, file, line)
}

fn assert_says(result: &Result<Settings, String>, parts: &[&str]) {
    let error = result.as_ref().expect_err(&format!("{parts:?} is accepted"));
    parts.iter().for_each(|part| assert!(error.contains(part), "`{error}` does not say `{part}`"));
}

#[test]
fn a_nul_is_refused_wherever_text_is() {
    let defaults = toml::Table::try_from(Settings::default()).unwrap();
    let texts = defaults.iter().flat_map(|(table, keys)| {
        let text = |(name, value): (&String, &toml::Value)| value.is_str().then(|| (table.clone(), name.clone()));
        keys.as_table().unwrap().iter().filter_map(text).collect::<Vec<_>>()
    });
    let mut seen = 0;
    for (table, name) in texts {
        // A word of a fixed list is refused for what it is.
        let error = from(&format!("[{table}]\n{name} = \"a\\u0000b\""), &[]).unwrap_err();
        assert!(error.contains(&name) && error.contains("tunnelfs.toml"), "{error}");
        seen += usize::from(error.contains("must not contain a NUL byte"));
    }
    assert!(seen >= 10, "{seen} texts");
}

#[test]
fn sizes_have_units_everywhere() {
    for (text, bytes) in [("65536", 65536), ("64k", 64 << 10), ("1M", 1 << 20), ("2MiB", 2 << 20), (" 8 KiB ", 8192)] {
        let size = |settings: Result<Settings, String>| settings.unwrap().transport.slot_size;
        assert_eq!(size(from("", &["--slot-size", text])), bytes, "{text}");
        assert_eq!(size(from(&format!("[transport]\nslot_size = {text:?}"), &[])), bytes, "{text}");
        let mut loader = Loader::new(Some("/dev/null".as_ref())).unwrap();
        assert!(loader.mount_word(&["transport"], &format!("slot_size={text}")).unwrap());
        assert_eq!(loader.finish().unwrap().transport.slot_size, bytes, "{text}");
    }
    assert_eq!(from("[transport]\nslot_size = 131072", &[]).unwrap().transport.slot_size, 131_072);
}

/// A guest's CPUs are not a host's: what a program does not use is not held against this machine.
#[test]
fn one_file_for_a_guest_and_a_host() {
    let file = "[mount]\ncpus = [99999]";
    assert_eq!(from(file, &[]).unwrap().mount.cpus, [99999]);
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("t"), file).unwrap();
    let mut loader = Loader::new(Some(&dir.path().join("t"))).unwrap();
    loader.mount_word(&["transport", "mount"], "slots=4").unwrap();
    assert!(loader.finish().unwrap_err().to_string().contains("mount.cpus = [99999]"));
}

#[test]
fn text_that_looks_like_a_number_stays_text() {
    let s = from("", &["--tag", "5", "--shared-dir", "17", "--xattrmap", "0"]).unwrap();
    assert_eq!((&s.host.tag[..], s.host.shared_dir.to_str(), &s.host.xattrmap[..]), ("5", Some("17"), "0"));
}

/// A daemon leaves its directory, and looks for the socket again when the host has gone.
#[test]
fn a_guest_s_socket_has_its_path_from_the_root() {
    let here = std::env::current_dir().unwrap();
    assert_eq!(from("", &["--socket-path", "some/socket"]).unwrap().transport.socket_path, here.join("some/socket"));
    let long = "x".repeat(107 - here.as_os_str().len());
    assert!(from("", &["--socket-path", &long]).unwrap_err().contains("and this one has 108"), "{long}");
}

#[test]
fn words_of_mount() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t");
    std::fs::write(&path, "").unwrap();
    const MOUNT: &[&str] = &["transport", "mount"];
    let mut loader = Loader::new(Some(&path)).unwrap();
    for word in ["slots=4", "queues=3", "slot_size=65536", "huge_pages", "cpus=0:0", "noallow_other"] {
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
    assert_eq!((&s.mount.cpus[..], s.mount.allow_other), (&[0, 0][..], false));
}

#[test]
fn a_missing_file_is_an_error_when_it_was_named() {
    assert!(Loader::new(Some("/nonexistent/t.toml".as_ref())).unwrap_err().to_string().contains("/nonexistent/t.toml"));
}

#[test]
fn settings_are_printed_with_where_they_come_from() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "[transport]\n\nslots = 16\n[host]\ncache = \"never\"\n").unwrap();
    let tables: &[&str] = &["transport", "wait"];
    let matches = clap::Command::new("x").args(args(tables)).get_matches_from([
        "x",
        "--config",
        file.path().to_str().unwrap(),
        "--slot-size",
        "64k",
    ]);
    let text = load(tables, &matches).unwrap().print();
    for line in [
        &format!("slots = 16  # {}:3", file.path().display()),
        "slot_size = 65536  # --slot-size",
        "policy = \"auto\"  # the default",
    ] {
        assert!(text.lines().any(|l| l == line), "{line}: {text}");
    }
    assert!(!text.contains("cache"), "not of this program: {text}");
    let _: toml::Table = toml::from_str(&text).unwrap();
}

#[test]
fn help_has_defaults_and_ranges() {
    let help = clap::Command::new("x").args(args(&["transport", "wait", "host", "log"])).render_long_help();
    let help = help.to_string();
    for part in ["[0 to 62; default: 0]", "[8k to 16M; default: 1M]", "[default: info]", "[0 to 1024; default: 64]"] {
        assert!(help.contains(part), "{part}: {help}");
    }
}

#[test]
fn too_few_huge_pages_come_with_the_command_that_makes_more() {
    let file = "[transport]\nhuge_pages = true\nqueues = 62\nslots = 16384\nentries = 16384\n";
    // A machine with 992 GiB of them has them.
    if let Err(e) = from(file, &[]) {
        assert!(e.contains("2 MiB pages") && e.contains("sysctl vm.nr_hugepages=$(("), "{e}");
    }
}
