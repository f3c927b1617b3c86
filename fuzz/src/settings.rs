//! Any text as `tunnelfs.toml`, and as words of `mount -o`: an error or settings that hold, never a panic.

use std::cell::RefCell;
use std::io::{Seek, Write};
use tunnelfs_settings::Loader;

thread_local! {
    static FILE: RefCell<tempfile::NamedTempFile> = RefCell::new(tempfile::NamedTempFile::new().unwrap());
}

pub fn once(bytes: &[u8]) {
    let valid = std::str::from_utf8(bytes).map_or_else(|e| e.valid_up_to(), str::len);
    let Ok(text) = std::str::from_utf8(&bytes[..valid]) else { return };
    FILE.with_borrow_mut(|file| {
        file.as_file().set_len(0).unwrap();
        file.rewind().unwrap();
        let (toml, words) = text.split_once('\0').unwrap_or((text, ""));
        file.write_all(toml.as_bytes()).unwrap();
        let Ok(mut loader) = Loader::new(Some(file.path())) else { return };
        for word in words.split(',') {
            let _ = loader.mount_word(&["transport", "wait", "host", "mount"], word);
        }
        if let Ok(settings) = loader.finish() {
            settings.transport.geometry().check().expect("checked by finish");
        }
    });
}
