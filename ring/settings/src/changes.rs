//! What differs between a program's present settings and its file's.

use crate::schema::Settings;
use toml::Table;

/// Returns the keys of `sections` (tables or single keys) whose values differ, each as `table.key`.
pub fn changed_keys(before: &Settings, now: &Settings, sections: &[&str]) -> Vec<String> {
    let [before, now] = [before, now].map(|settings| Table::try_from(settings).expect("settings are plain values"));
    let mut keys = Vec::new();
    for (section, values) in &now {
        for (name, value) in values.as_table().into_iter().flatten() {
            let key = format!("{section}.{name}");
            let used = sections.iter().any(|used| *used == section || *used == key);
            if used && before.get(section).and_then(|values| values.get(name)) != Some(value) {
                keys.push(key);
            }
        }
    }
    keys
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_keys_that_are_used_and_differ_are_named() {
        let (before, mut now) = (Settings::default(), Settings::default());
        assert!(changed_keys(&before, &now, &["wait", "host"]).is_empty());
        now.wait.spin_us = 7;
        now.transport.slots = 8;
        now.host.readonly = true;
        assert_eq!(changed_keys(&before, &now, &["wait", "transport.slots"]), ["transport.slots", "wait.spin_us"]);
    }
}
