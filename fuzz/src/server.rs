//! The server that the host's targets share, on a small directory.

use std::sync::LazyLock;
use tunnelfs_host::fs::Passthrough;
use tunnelfs_host::fs_builder;
use tunnelfs_host::Server;
use tunnelfs_settings::Host;

/// In a temporary directory that stays: a guest of no known end works in it.
pub static SERVER: LazyLock<Server<Passthrough>> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap().keep();
    std::fs::create_dir(dir.join("share")).unwrap();
    std::fs::write(dir.join("share/words"), "words").unwrap();
    let host = Host { shared_dir: dir.join("share"), xattr: true, rlimit_nofile: 4000, ..Host::default() };
    Server::new(fs_builder::open(&host).unwrap())
});
