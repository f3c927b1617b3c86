//! What host and guest hold over time. Flat means: between two looks at the same process at rest in the same state, no
//! more descriptors and threads, and memory that stays within what allocators keep.

use nix::unistd::Pid;
use std::fmt::Write as _;
use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tunnelfs_bench::resources::Resources;

/// By how much memory may grow over the first look, KiB.
const GROWTH: usize = 8 << 10;
/// How long a process may take to come down to what it held.
const PATIENCE: Duration = Duration::from_secs(20);

/// When a look is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// A mount whose files are removed.
    Mounted,
    /// A host between two guests.
    Alone,
}

/// The looks taken so far.
pub struct Record {
    start: Instant,
    file: fs::File,
    path: PathBuf,
    hosts: usize,
    guests: usize,
    looks: usize,
    /// The first of this host alone, of this guest's host, and of this guest.
    first: [Option<Resources>; 3],
    /// The most memory that one process has grown by, KiB: host alone, host mounted, guest.
    grown: [usize; 3],
    largest: [Resources; 3],
}

impl Record {
    /// Into `target/tmp`.
    pub fn new(seed: u64) -> Record {
        let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("soak-{seed}.csv"));
        let mut file = fs::File::create(&path).unwrap();
        let of = |who: &str| format!("{who}_descriptors,{who}_threads,{who}_anonymous_kib");
        writeln!(file, "seconds,host,guest,state,{},{}", of("host"), of("guest")).unwrap();
        let (first, grown, largest) = Default::default();
        Record { start: Instant::now(), file, path, hosts: 0, guests: 0, looks: 0, first, grown, largest }
    }

    pub fn new_host(&mut self) {
        self.hosts += 1;
        self.first = [None; 3];
    }

    /// Another guest has another number of queues, for which the host has other threads and bells.
    pub fn new_guest(&mut self) {
        self.guests += 1;
        self.first[1] = None;
        self.first[2] = None;
    }

    /// Notes a look, and asserts that it is flat.
    pub fn look(&mut self, state: State, host: Pid, guest: Option<Pid>) -> String {
        let host = self.flat(usize::from(state == State::Mounted), "the host", host);
        let guest = guest.map(|guest| self.flat(2, "the guest", guest));
        self.looks += 1;
        let seconds = self.start.elapsed().as_secs_f64();
        let words = |held: Resources| format!("{},{},{}", held.descriptors, held.threads, held.anonymous_kib);
        let (of_host, of_guest) = (words(host), guest.map(words).unwrap_or_else(|| ",,".into()));
        writeln!(self.file, "{seconds:.1},{},{},{state:?},{of_host},{of_guest}", self.hosts, self.guests).unwrap();
        let mut line = format!("{seconds:5.0} s: host {host}");
        let _ = guest.map(|guest| write!(line, ", guest {guest}"));
        line
    }

    fn flat(&mut self, place: usize, who: &str, pid: Pid) -> Resources {
        let mut now = Resources::at_rest(pid);
        let first = *self.first[place].get_or_insert(now);
        let start = Instant::now();
        while now.descriptors > first.descriptors
            || now.threads > first.threads
            || now.anonymous_kib > first.anonymous_kib + GROWTH
        {
            assert!(start.elapsed() < PATIENCE, "a leak: {who} holds {now}, and held {first} at first");
            std::thread::sleep(Duration::from_millis(100));
            now = Resources::of(pid);
        }
        let largest = &mut self.largest[place];
        self.grown[place] = self.grown[place].max(now.anonymous_kib.saturating_sub(first.anonymous_kib));
        largest.descriptors = largest.descriptors.max(now.descriptors);
        largest.threads = largest.threads.max(now.threads);
        largest.anonymous_kib = largest.anonymous_kib.max(now.anonymous_kib);
        now
    }

    /// What it came to.
    pub fn summary(&self) -> String {
        let [alone, mounted, guest] =
            [0, 1, 2].map(|i| format!("{}, grown by {} KiB at most", self.largest[i], self.grown[i]));
        format!(
            "{} looks, all flat; most held: host alone {alone}; with a mount {mounted}; guest {guest}; recorded in {}",
            self.looks,
            self.path.display()
        )
    }
}
