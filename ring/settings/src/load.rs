//! Defaults, then the file, then the command line; and where each value came from.

use crate::error::Error;
use crate::limits::{self, Refusal};
use crate::numbers;
use crate::options::{self, ArgKind, OptionSpec};
use crate::schema::Settings;
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use toml::{Table, Value};

/// Where the file is looked for when none is named.
pub const SYSTEM_FILE: &str = "/etc/tunnelfs/tunnelfs.toml";

/// Settings under construction.
#[derive(Debug)]
pub struct Loader {
    settings: Settings,
    table: Table,
    file: Option<(PathBuf, String)>,
    /// Key and origin of what did not come from the file.
    overrides: Vec<(&'static str, String)>,
    /// The tables and single keys that the program uses.
    used: Vec<&'static str>,
}

impl Loader {
    /// Reads `file`, or the system's where there is one, or nothing.
    ///
    /// # Errors
    /// [`Error`] names the file, the line, the key and what is allowed.
    pub fn new(file: Option<&Path>) -> Result<Self, Error> {
        let path = file.unwrap_or(Path::new(SYSTEM_FILE));
        let text = match std::fs::read_to_string(path) {
            Err(e) if file.is_none() && e.kind() == std::io::ErrorKind::NotFound => return Ok(Self::defaults()),
            text => text.map_err(|source| Error::File { path: path.into(), source })?,
        };
        Self::of_text(path, text)
    }

    /// Takes over a file's text, which the caller has read.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn of_text(path: &Path, text: String) -> Result<Self, Error> {
        let told = |e: toml::de::Error| Error::Toml { path: path.into(), text: numbers::plain(&e.to_string()) };
        let settings = toml::from_str(&text).map_err(told)?;
        let table = toml::from_str(&text).map_err(told)?;
        Ok(Loader { settings, table, file: Some((path.into(), text)), overrides: Vec::new(), used: Vec::new() })
    }

    fn defaults() -> Self {
        Loader {
            settings: Settings::default(),
            table: Table::new(),
            file: None,
            overrides: Vec::new(),
            used: Vec::new(),
        }
    }

    /// Sets one key as the command line has it; `origin` is for messages.
    fn set(&mut self, key: &'static str, value: Value, origin: String) -> Result<(), Error> {
        let (section, name) = key.split_once('.').expect("every key has a table");
        let shown = value.to_string();
        let section = self.table.entry(section).or_insert_with(|| Value::Table(Table::new()));
        section.as_table_mut().expect("checked by the schema").insert(name.into(), value);
        self.settings = Settings::deserialize(self.table.clone()).map_err(|e| Error::Value {
            key: key.into(),
            value: shown,
            allowed: numbers::plain(e.message().trim()),
            origin: origin.clone(),
        })?;
        self.overrides.push((key, origin));
        Ok(())
    }

    /// Takes over what a command line made with [`crate::args`] says.
    ///
    /// # Errors
    /// [`Error::Value`].
    pub fn apply_args(&mut self, sections: &'static [&'static str], matches: &clap::ArgMatches) -> Result<(), Error> {
        self.use_tables(sections);
        for spec in options::of(sections) {
            let given = match spec.form {
                ArgKind::Switch(meaning) => matches.get_flag(spec.option).then_some(Value::Boolean(meaning)),
                form => matches.get_one::<String>(spec.option).map(|text| parse(text, spec.key, form)),
            };
            if let Some(value) = given {
                self.set(spec.key, value, format!("--{}", spec.option))?;
            }
        }
        Ok(())
    }

    /// Takes over one word of an `-o`, an option's or a key's name; `false` when it is not a setting of these tables.
    ///
    /// # Errors
    /// [`Error::Value`].
    pub fn mount_word(&mut self, sections: &'static [&'static str], text: &str) -> Result<bool, Error> {
        self.use_tables(sections);
        let (name, value) = text.split_once('=').map_or((text, None), |(name, value)| (name, Some(value)));
        let Some(spec) = options::of(sections).find(|w| w.is(name)) else { return Ok(false) };
        let origin = format!("-o {text}");
        let value = match (spec.form, value) {
            (ArgKind::Switch(meaning), None) => Value::Boolean(meaning),
            (ArgKind::Switch(_), Some(v)) => {
                return Err(self.refused(spec.key, v, "stands alone, without a value", origin))
            }
            (_, None) => return Err(self.refused(spec.key, "", "needs a value", origin)),
            (form, Some(v)) => parse(v, spec.key, form),
        };
        self.set(spec.key, value, origin)?;
        Ok(true)
    }

    fn refused(&self, key: &str, value: &str, allowed: &str, origin: String) -> Error {
        Error::Value { key: key.into(), value: value.into(), allowed: allowed.into(), origin }
    }

    fn use_tables(&mut self, sections: &'static [&'static str]) {
        for section in sections {
            if !self.used.contains(section) {
                self.used.push(section);
            }
        }
    }

    fn uses(&self, key: &str) -> bool {
        self.used.iter().any(|used| key.strip_prefix(used).is_some_and(|rest| rest.is_empty() || rest.starts_with('.')))
    }

    /// Writes the settings that the program uses as a settings file, each with where it comes from.
    pub fn print(&self) -> String {
        let mut text = String::new();
        let all = Table::try_from(&self.settings).expect("settings are plain values");
        for (section, keys) in &all {
            let mut lines = String::new();
            for (name, value) in keys.as_table().into_iter().flatten() {
                let key = format!("{section}.{name}");
                if self.uses(&key) {
                    lines += &format!("{name} = {value}  # {}\n", self.origin(&key));
                }
            }
            if !lines.is_empty() {
                text += &format!("{}[{section}]\n{lines}", if text.is_empty() { "" } else { "\n" });
            }
        }
        text
    }

    /// Returns the settings, checked against each other and against this machine.
    ///
    /// # Errors
    /// [`Error::Value`] names the key, its value, what is allowed, and where it was set.
    pub fn finish(self) -> Result<Settings, Error> {
        let checks = limits::no_nul(&self.table)
            .and_then(|()| limits::check(&self.settings))
            .and_then(|()| limits::check_here(&self.settings, |key| self.uses(key)));
        match checks {
            Ok(()) => Ok(self.settings),
            Err(refusal) => Err(self.explain(refusal)),
        }
    }

    /// As [`Self::finish`], for a program that runs with such settings already: from a sandbox the machine is not seen.
    ///
    /// # Errors
    /// As [`Self::finish`].
    pub fn finish_again(mut self) -> Result<Settings, Error> {
        let checks = limits::no_nul(&self.table)
            .and_then(|()| limits::check(&self.settings))
            .and_then(|()| limits::from_root(&mut self.settings));
        match checks {
            Ok(()) => Ok(self.settings),
            Err(refusal) => Err(self.explain(refusal)),
        }
    }

    /// As [`Self::finish`], for the side that brings the shared memory and finds the socket again on a reconnect.
    ///
    /// # Errors
    /// As [`Self::finish`]; also when the memory is not there.
    pub fn finish_with_memory(mut self) -> Result<Settings, Error> {
        if let Err(refusal) = limits::memory(&self.settings).and_then(|()| limits::from_root(&mut self.settings)) {
            return Err(self.explain(refusal));
        }
        self.finish()
    }

    /// The value as it was written, else as it is by default; and where it comes from.
    fn explain(&self, Refusal { key, allowed }: Refusal) -> Error {
        let (section, name) = key.split_once('.').expect("every key has a table");
        let value = self.table.get(section).and_then(|s| s.get(name)).or_else(|| default_of(&key));
        let value = value.map_or_else(String::new, ToString::to_string);
        self.refused(&key, &value, &allowed, self.origin(&key))
    }

    fn origin(&self, key: &str) -> String {
        if let Some((_, origin)) = self.overrides.iter().rev().find(|(k, _)| *k == key) {
            return origin.clone();
        }
        let (section, name) = key.split_once('.').expect("every key has a table");
        let in_file = self.table.get(section).and_then(|s| s.get(name)).is_some();
        match &self.file {
            Some((path, text)) if in_file => format!("{}:{}", path.display(), line_of(text, section, name)),
            _ => "the default".into(),
        }
    }
}

/// The command-line options of the settings in `sections`: whole tables or single keys, and `--config`.
pub fn args(sections: &'static [&'static str]) -> Vec<clap::Arg> {
    let option = |spec: &OptionSpec| {
        let arg = clap::Arg::new(spec.option).long(spec.option).help(help(spec));
        match spec.form {
            ArgKind::Switch(_) => arg.action(clap::ArgAction::SetTrue),
            ArgKind::Value(name) | ArgKind::List(name) => arg.value_name(name),
        }
    };
    let config = clap::Arg::new("config")
        .long("config")
        .value_name("FILE")
        .value_parser(clap::value_parser!(PathBuf))
        .help(format!("Settings file [default: {SYSTEM_FILE}, if there is one]"));
    options::of(sections).map(option).chain([config]).collect()
}

/// A setting's description, its range and its default.
fn help(spec: &OptionSpec) -> String {
    if matches!(spec.form, ArgKind::Switch(_)) {
        return spec.help.into();
    }
    let mut notes: Vec<String> = limits::range(spec.key).into_iter().collect();
    match default_of(spec.key) {
        Some(Value::Integer(n)) if spec.key == "transport.slot_size" => notes.push(format!("default: {}M", n >> 20)),
        Some(Value::String(text)) if !text.is_empty() => notes.push(format!("default: {text}")),
        Some(value @ Value::Integer(_)) => notes.push(format!("default: {value}")),
        _ => {}
    }
    match notes.is_empty() {
        true => spec.help.into(),
        false => format!("{} [{}]", spec.help, notes.join("; ")),
    }
}

/// What a command line made with [`args`] and the file that it names say.
///
/// # Errors
/// [`Error`].
pub fn load(sections: &'static [&'static str], matches: &clap::ArgMatches) -> Result<Loader, Error> {
    let mut loader = Loader::new(matches.get_one::<PathBuf>("config").map(PathBuf::as_path))?;
    loader.apply_args(sections, matches)?;
    Ok(loader)
}

/// The line of a key in a file that has it, from 1.
fn line_of(text: &str, section: &str, name: &str) -> usize {
    let Ok(document) = toml::de::DeTable::parse(text) else { return 1 };
    let table = document.get_ref().get(section).and_then(|s| s.get_ref().as_table());
    let start = table.and_then(|t| t.get_key_value(name)).map_or(0, |(key, _)| key.span().start);
    1 + text[..start].matches('\n').count()
}

/// A key's default value, which also tells its type.
fn default_of(key: &str) -> Option<&'static Value> {
    static DEFAULTS: OnceLock<Table> = OnceLock::new();
    let table = DEFAULTS.get_or_init(|| Table::try_from(Settings::default()).expect("the defaults are plain values"));
    let (section, name) = key.split_once('.')?;
    table.get(section)?.get(name)
}

/// A word of a command line as TOML would have it: text stays text, also where it looks like a number.
fn parse(text: &str, key: &str, form: ArgKind) -> Value {
    let number = |t: &str| t.trim().parse().map_or_else(|_| Value::String(t.into()), Value::Integer);
    match form {
        ArgKind::List(_) => Value::Array(text.split([',', ':']).filter(|t| !t.trim().is_empty()).map(number).collect()),
        _ if default_of(key).is_some_and(Value::is_integer) => number(text),
        _ => Value::String(text.into()),
    }
}
