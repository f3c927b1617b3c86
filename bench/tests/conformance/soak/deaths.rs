//! How a mount ends; what was acknowledged before is there afterwards.

use crate::rig::{is_mounted, soon, Guest, Host, Scratch};
use crate::Rng;
use nix::mount::{umount2, MntFlags};
use nix::sys::signal::{kill, Signal};
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::time::Duration;

/// What ends it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Unmounted,
    Terminated,
    GuestKilled,
    HostKilled,
}

const ALL: [End; 4] = [End::Unmounted, End::Terminated, End::GuestKilled, End::HostKilled];
/// Bytes of a record.
const RECORD: usize = 5000;

impl End {
    pub fn draw(rng: &mut Rng) -> End {
        ALL[rng.below(ALL.len())]
    }

    pub fn name(self) -> &'static str {
        match self {
            End::Unmounted => "an unmount",
            End::Terminated => "SIGTERM for the guest",
            End::GuestKilled => "SIGKILL for the guest",
            End::HostKilled => "SIGKILL for the host",
        }
    }

    /// How often each has come.
    pub fn count(ends: &[End]) -> String {
        let counts = ALL.map(|end| format!("{} {}", ends.iter().filter(|e| **e == end).count(), end.name()));
        counts.join(", ")
    }

    /// Makes it come, under load where it is a death; how many records were found again.
    pub fn come(self, mut guest: Guest, host: &mut Host, scratch: &Scratch) -> u64 {
        match self {
            End::Unmounted => guest.unmount(),
            End::Terminated => {
                guest.signal(Signal::SIGTERM);
                assert!(guest.ended().success(), "{}", guest.output());
            }
            End::GuestKilled => {
                let victim = guest.pid();
                return killed(guest, scratch, || kill(victim, Signal::SIGKILL).unwrap());
            }
            End::HostKilled => {
                let victim = host.server();
                let found = killed(guest, scratch, || kill(victim, Signal::SIGKILL).unwrap());
                host.child.wait().unwrap();
                return found;
            }
        }
        0
    }
}

fn killed(mut guest: Guest, scratch: &Scratch, death: impl FnOnce()) -> u64 {
    let names = [0, 1, 2].map(|i| format!("records{i}"));
    let acknowledged = std::thread::scope(|scope| {
        let paths = names.each_ref().map(|name| guest.point.join(name));
        let writers = paths.map(|path| scope.spawn(move || write_records(&path)));
        std::thread::sleep(Duration::from_millis(500));
        death();
        writers.map(|writer| writer.join().unwrap())
    });
    assert!(!guest.ended().success(), "{}", guest.output());
    soon("it is unmounted", || {
        (!is_mounted(&guest.point) || umount2(&guest.point, MntFlags::empty()).is_ok()).then_some(())
    });
    for (name, &count) in names.iter().zip(&acknowledged) {
        let path = scratch.path("share").join(name);
        let found = fs::read(&path).unwrap();
        assert!(found.len() >= count * RECORD, "{name}: {count} records were synced, {} bytes are there", found.len());
        for (n, bytes) in found.chunks(RECORD).take(count).enumerate() {
            assert!(bytes == record(n), "{name}: record {n} has other bytes");
        }
        fs::remove_file(path).unwrap();
    }
    acknowledged.iter().sum::<usize>() as u64
}

fn record(n: usize) -> Vec<u8> {
    (0..RECORD).map(|i| (i * 7 + n * 31 + (n >> 8)) as u8).collect()
}

/// Appends records until that fails; how many were synced.
fn write_records(path: &Path) -> usize {
    let Ok(mut file) = File::create(path) else { return 0 };
    (0..).take_while(|n| file.write_all(&record(*n)).and_then(|()| file.sync_data()).is_ok()).count()
}
