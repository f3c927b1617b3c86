//! Whether other threads wait for a CPU, as the kernel tells it (`/proc/pressure/cpu`, Documentation/accounting/psi.rst).

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

/// Time between two looks. A look costs about 5 us.
const INTERVAL: Duration = Duration::from_millis(50);
/// The part of an interval, in percent, during which some thread waited for a CPU, from which on CPUs are scarce. A
/// thread that is woken on a busy CPU waits for microseconds; a build on all CPUs comes to 50 and more.
const SCARCE: u64 = 30;

/// The file, kept open for a sandbox that hides it. `None`: the kernel has none.
static KEPT: OnceLock<Option<Arc<File>>> = OnceLock::new();
/// The file, while somebody has it open.
static SHARED: Mutex<Weak<File>> = Mutex::new(Weak::new());

/// Opens the kernel's file, before a sandbox hides it. It stays open.
pub fn open_cpu_pressure() {
    KEPT.get_or_init(open);
}

fn open() -> Option<Arc<File>> {
    File::open("/proc/pressure/cpu").ok().map(Arc::new)
}

/// The file, one for the whole process.
fn file() -> Option<Arc<File>> {
    if let Some(kept) = KEPT.get() {
        return kept.clone();
    }
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    let file = shared.upgrade().or_else(open)?;
    *shared = Arc::downgrade(&file);
    Some(file)
}

/// Looks at the pressure from time to time.
#[derive(Debug, Default)]
pub(crate) struct CpuPressure {
    /// The kernel's file; `None`: CPUs are never scarce.
    file: Option<Arc<File>>,
    /// When the last look was, and what it saw: microseconds in all during which a thread has waited.
    last: Option<(Instant, u64)>,
    scarce: bool,
}

impl CpuPressure {
    /// The pressure of this machine.
    pub fn new() -> Self {
        CpuPressure { file: file(), ..CpuPressure::default() }
    }

    /// Whether other threads waited for a CPU for much of the time before the last look. Looks again if that was long
    /// ago.
    pub fn is_scarce(&mut self, now: Instant) -> bool {
        let due = self.last.is_none_or(|(at, _)| now.saturating_duration_since(at) >= INTERVAL);
        if due {
            if let Some(waited) = self.file.as_deref().and_then(read) {
                self.note(now, waited);
            }
        }
        self.scarce
    }

    /// What the last look saw.
    pub fn was_scarce(&self) -> bool {
        self.scarce
    }

    fn note(&mut self, now: Instant, waited: u64) {
        if let Some((at, before)) = self.last.replace((now, waited)) {
            let elapsed = now.saturating_duration_since(at).as_micros() as u64;
            // A look long ago tells of what was, not of what is.
            self.scarce =
                elapsed < 4 * INTERVAL.as_micros() as u64 && waited.saturating_sub(before) * 100 >= elapsed * SCARCE;
        }
    }
}

/// Microseconds during which some thread waited: `some avg10=0.00 avg60=0.00 avg300=0.00 total=N`.
fn read(file: &File) -> Option<u64> {
    let mut text = [0; 128];
    let n = file.read_at(&mut text, 0).ok()?;
    parse(std::str::from_utf8(&text[..n]).ok()?)
}

fn parse(text: &str) -> Option<u64> {
    let some = text.lines().find(|line| line.starts_with("some "))?;
    some.split_once("total=")?.1.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_text_is_understood() {
        let text = "some avg10=99.31 avg60=96.01 avg300=83.42 total=6752815542\nfull avg10=0.00 total=0\n";
        assert_eq!(parse(text), Some(6_752_815_542));
        for other in ["", "full total=7", "some", "some total=x"] {
            assert_eq!(parse(other), None);
        }
    }

    #[test]
    fn cpus_are_scarce_while_threads_wait() {
        let (mut pressure, start) = (CpuPressure::default(), Instant::now());
        let at = |ms: u64| start + Duration::from_millis(ms);
        pressure.note(at(0), 1000);
        assert!(!pressure.scarce, "nothing to compare with");
        pressure.note(at(50), 1000 + 40_000);
        assert!(pressure.scarce);
        pressure.note(at(100), 41_000 + 5_000);
        assert!(!pressure.scarce);
        pressure.note(at(5_000), 46_000 + 4_000_000);
        assert!(!pressure.scarce, "a look that was long ago");
    }
}
