//! Figures as people write them: three digits, no exponents.

/// Three digits that count, at least.
pub fn three(value: f64) -> String {
    match value.abs() {
        v if v >= 99.95 => format!("{value:.0}"),
        v if v >= 9.995 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// Nanoseconds.
pub fn time(ns: f64) -> String {
    match ns {
        n if n >= 1e9 => format!("{} s", three(n / 1e9)),
        n if n >= 1e7 => format!("{} ms", three(n / 1e6)),
        n => format!("{} µs", three(n / 1e3)),
    }
}

/// Operations a second.
pub fn rate(ops: f64) -> String {
    match ops {
        o if o >= 999_500.0 => format!("{} M/s", three(o / 1e6)),
        o if o >= 999.5 => format!("{} k/s", three(o / 1e3)),
        o => format!("{} /s", three(o)),
    }
}

/// Bytes a second.
pub fn bandwidth(bytes: f64) -> String {
    match bytes {
        b if b >= 999.5e6 => format!("{} GB/s", three(b / 1e9)),
        b => format!("{} MB/s", three(b / 1e6)),
    }
}

/// A size.
pub fn bytes(bytes: u64) -> String {
    match bytes {
        b if b >= 1 << 20 && b % (1 << 20) == 0 => format!("{} MiB", b >> 20),
        b if b >= 1 << 10 && b % (1 << 10) == 0 => format!("{} KiB", b >> 10),
        b => format!("{b} B"),
    }
}

/// A ratio: `5.6×`.
pub fn times(ratio: f64) -> String {
    match ratio {
        r if r >= 9.95 => format!("{r:.0}×"),
        r if r >= 1.995 => format!("{r:.1}×"),
        r => format!("{r:.2}×"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_plain() {
        assert_eq!(rate(10_370.0), "10.4 k/s");
        assert_eq!(rate(6_501_900.0), "6.50 M/s");
        assert_eq!(
            (time(210.0), time(4_057_090.0), time(2.5e9)),
            ("0.21 µs".into(), "4057 µs".into(), "2.50 s".into())
        );
        assert_eq!((bandwidth(4.89e9), bandwidth(21.46e6)), ("4.89 GB/s".into(), "21.5 MB/s".into()));
        assert_eq!((bytes(512), bytes(65_536), bytes(3 << 20)), ("512 B".into(), "64 KiB".into(), "3 MiB".into()));
    }
}
