//! virtiofsd's former options, `-o source=DIR,cache=none,...`: libvirt starts a back end with them, as of 9.0 even one
//! that says it has the separate ones. Source: `parse_compat` of virtiofsd 1.14.0, and the C program's before it.

/// The setting that a word stands for, as `NAME` or `NAME=VALUE`; `None` for what is so anyway.
pub fn setting(word: &str) -> Option<String> {
    match word {
        "no_xattr" | "no_posix_acl" | "no_writeback" | "no_allow_direct_io" | "no_security_label" | "readdirplus" => {
            None
        }
        // Locks stay in the guest.
        "no_posix_lock" | "no_flock" => None,
        "posix_acl" => Some("posix_acl=always".into()),
        "cache=none" => Some("cache=never".into()),
        _ => Some(word.strip_prefix("source=").map_or_else(|| word.into(), |dir| format!("shared_dir={dir}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::setting;

    #[test]
    fn what_libvirt_writes_is_understood() {
        let words = "source=/srv/data,cache=none,sandbox=chroot,xattr,no_posix_lock,no_flock";
        let settings: Vec<_> = words.split(',').filter_map(setting).collect();
        assert_eq!(settings, ["shared_dir=/srv/data", "cache=never", "sandbox=chroot", "xattr"]);
    }
}
