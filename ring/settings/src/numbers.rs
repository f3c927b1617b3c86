//! Numbers and sizes, as the file, a command line and `-o` write them.

use serde::de::{Deserializer, Error, Unexpected, Visitor};
use std::fmt;
use std::marker::PhantomData;

/// Accepts a whole number of the field's type. The refusal says the type's range instead of its Rust name.
///
/// # Errors
/// Anything else.
pub(crate) fn whole<'de, D: Deserializer<'de>, N: Whole>(deserializer: D) -> Result<N, D::Error> {
    deserializer.deserialize_any(WholeVisitor(PhantomData))
}

/// The number types of the settings.
pub(crate) trait Whole: TryFrom<i64> {
    const MAX: u64;
}

impl Whole for u16 {
    const MAX: u64 = u16::MAX as u64;
}
impl Whole for u32 {
    const MAX: u64 = u32::MAX as u64;
}
/// TOML's integers end here.
impl Whole for u64 {
    const MAX: u64 = i64::MAX as u64;
}
impl Whole for usize {
    const MAX: u64 = i64::MAX as u64;
}

struct WholeVisitor<N>(PhantomData<N>);

impl<N: Whole> Visitor<'_> for WholeVisitor<N> {
    type Value = N;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a whole number from 0 to {}", N::MAX)
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<N, E> {
        N::try_from(number).map_err(|_| E::invalid_value(Unexpected::Signed(number), &self))
    }

    /// As JSON has it: a recorded run holds its settings.
    fn visit_u64<E: Error>(self, number: u64) -> Result<N, E> {
        self.visit_i64(i64::try_from(number).unwrap_or(i64::MAX))
    }
}

/// Accepts bytes as a number, or as text with a unit: `65536`, `"64k"`, `"1M"`, `"2MiB"`.
///
/// # Errors
/// Anything else.
pub(crate) fn bytes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    deserializer.deserialize_any(BytesVisitor)
}

struct BytesVisitor;

impl Visitor<'_> for BytesVisitor {
    type Value = u32;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "bytes: a number up to {}, or one with a unit, such as 64k, 1M or 2MiB", u32::MAX)
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<u32, E> {
        u32::try_from(number).map_err(|_| E::invalid_value(Unexpected::Signed(number), &self))
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<u32, E> {
        self.visit_i64(i64::try_from(number).unwrap_or(i64::MAX))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<u32, E> {
        let bytes = parse_bytes(text).and_then(|bytes| u32::try_from(bytes).ok());
        bytes.ok_or_else(|| E::invalid_value(Unexpected::Str(text), &self))
    }
}

/// Returns the bytes that `text` means: a number, alone or with k, M, G, KiB, MiB or GiB behind it (in any case).
/// `None` for anything else, and for more bytes than a `u64` counts.
pub fn parse_bytes(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// Replaces Rust's names of number types in serde's messages by what they hold.
pub(crate) fn plain(message: &str) -> String {
    let whole = |most: u64| format!("expected a whole number from 0 to {most}");
    message.replace("expected u32", &whole(u32::MAX.into())).replace("expected usize", &whole(<usize as Whole>::MAX))
}
