//! With a host that watches the share itself: `tunnelfs-host --cache coherent`.

use crate::rig::{is_listening, soon, Guest, Host, Peer, Scratch, Stopped, PROMPT};
use crate::{cases, run_cases, World};
use nix::sys::signal::{kill, Signal};
use std::fs::{self, File, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};
use tunnelfs_bench::session::sibling;

/// A host that watches.
pub fn start(scratch: &Scratch) -> Host {
    Host::start_with(scratch, Peer::Ours, &["--cache", "coherent"])
}

#[test]
fn changes_are_seen_from_a_host_that_watches() {
    let Some(world) = World::real("uring", "ring") else { return };
    run_cases(world, cases::CASES, "a host that watches");
}

/// The names that the guest's kernel has been told of stay with the host that follows.
#[test]
fn another_host_goes_on_and_nothing_stays_stale() {
    let Some(mut world) = World::real("uring", "ring") else { return };
    let hosts = [(); 2].map(|()| NextHost::new(&world));
    fs::create_dir(world.behind("d")).unwrap();
    fs::write(world.behind("d/old"), "old").unwrap();
    soon("it appears", || fs::read_to_string(world.inside("d/old")).ok());
    let open = File::open(world.inside("d/old")).unwrap();
    assert!(fs::metadata(world.inside("d/new")).is_err());
    assert_eq!(crate::names(&world.inside("d")), ["old"]);
    for (round, mut next) in hosts.into_iter().enumerate() {
        world.replace_host(&mut next, |share| {
            let (old, new) = (share.join("d/old"), share.join("d/new"));
            if round == 0 {
                fs::write(new, "new").unwrap();
                fs::set_permissions(old, Permissions::from_mode(0o604)).unwrap();
            } else {
                fs::remove_file(new).unwrap();
            }
        });
        let there = round == 0;
        soon("what changed without a host", || (world.inside("d/new").exists() == there).then_some(()));
        let mode = || open.metadata().unwrap().permissions().mode() & 0o777;
        soon("an open file's attributes", || (mode() == 0o604).then_some(()));
        let wanted: &[&str] = if there { &["new", "old"] } else { &["old"] };
        soon("a list", || (crate::names(&world.inside("d")) == wanted).then_some(()));
        // What the new host sees, in numbers of its own.
        fs::write(world.behind("d/later"), "x").unwrap();
        soon("a name that appears later", || world.inside("d/later").exists().then_some(()));
        fs::remove_file(world.behind("d/later")).unwrap();
        soon("and is gone", || (!world.inside("d/later").exists()).then_some(()));
        fs::write(world.behind("d/old"), format!("round {round}")).unwrap();
        let wanted = format!("round {round}");
        soon("data", || (fs::read_to_string(world.inside("d/old")).ok()? == wanted).then_some(()));
    }
    drop(open);
    world.guest.unmount();
}

#[test]
fn a_guest_that_does_not_answer_holds_up_a_writer_for_a_moment() {
    let Some(world) = World::real("fuse", "ring") else { return };
    fs::write(world.behind("file"), "one").unwrap();
    soon("it appears", || fs::read_to_string(world.inside("file")).ok());
    assert_eq!(fs::read_to_string(world.inside("file")).unwrap(), "one");
    let stopped = Stopped::new(world.guest.pid());
    let begun = Instant::now();
    let mut file = File::options().write(true).open(world.behind("file")).unwrap();
    assert!(begun.elapsed() < PROMPT, "{:?}", begun.elapsed());
    file.write_all(b"two").unwrap();
    drop((file, stopped));
    soon("the new data", || (fs::read_to_string(world.inside("file")).ok()? == "two").then_some(()));
    world.guest.unmount();
}

/// Who opens a file after somebody has closed it reads what that one wrote, with no time in between: also when the guest's
/// kernel does not ask to open files, and whether it reads or maps the file.
#[test]
fn what_is_read_is_never_older_than_what_was_closed_before() {
    for channel in ["uring", "fuse"] {
        let Some(world) = World::real(channel, "ring") else { continue };
        rewrite_and_read(&world, Duration::from_secs(5));
        world.guest.unmount();
    }
}

/// Files that are written on the host, by the guest, or by both.
fn rewrite_and_read(world: &World, time: Duration) {
    let written = [(); 3].map(|()| Mutex::new(0u64));
    let names = ["by-host", "by-guest", "by-both"];
    let until = Instant::now() + time;
    names.iter().for_each(|name| fs::write(world.behind(name), text(0)).unwrap());
    soon("they appear", || names.iter().all(|name| world.inside(name).exists()).then_some(()));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0.. {
                let file = round % names.len();
                let mut version = written[file].lock().unwrap();
                let guests = file == 1 || file == 2 && round % 2 == 0;
                let path = if guests { world.inside(names[file]) } else { world.behind(names[file]) };
                let mut open = File::options().write(true).open(path).unwrap();
                open.write_all(&text(*version + 1)).unwrap();
                drop(open);
                *version += 1;
                drop(version);
                if Instant::now() > until {
                    return;
                }
                // Each so often the readers' data is in the cache.
                std::thread::sleep(Duration::from_micros(round as u64 % 7 * 50));
            }
        });
        for reader in 0..2 {
            let written = &written;
            scope.spawn(move || {
                for round in reader.. {
                    let file = round % names.len();
                    // The writer needs this lock too.
                    let guard = written[file].lock().unwrap();
                    let wanted = text(*guard);
                    let read = || fs::read(world.inside(names[file])).unwrap();
                    let got = if round % 5 == 0 { map(&world.inside(names[file])) } else { read() };
                    assert_eq!(got, wanted, "{} in round {round}", names[file]);
                    drop(guard);
                    if Instant::now() > until {
                        return;
                    }
                }
            });
        }
    });
}

/// A store through a mapping changes neither time nor size, as far as anybody sees.
#[test]
fn stores_through_a_mapping_of_the_host_are_seen() {
    let Some(world) = World::real("uring", "ring") else { return };
    fs::write(world.behind("mapped"), "0000").unwrap();
    soon("it appears", || world.inside("mapped").exists().then_some(()));
    let file = File::options().read(true).write(true).open(world.behind("mapped")).unwrap();
    // SAFETY: the file is not truncated.
    let mut mapping = unsafe { memmap2::MmapMut::map_mut(&file) }.unwrap();
    for round in 1..50 {
        let text = format!("{round:04}");
        mapping.copy_from_slice(text.as_bytes());
        soon("what was stored", || (fs::read_to_string(world.inside("mapped")).unwrap() == text).then_some(()));
    }
    drop((mapping, file));
    // Also when it was mapped only while no lease covered what the guest itself has written.
    for round in 50..60 {
        let text = format!("{round:04}");
        fs::write(world.inside("mapped"), "ours").unwrap();
        std::thread::sleep(Duration::from_millis(50));
        let file = File::options().read(true).write(true).open(world.behind("mapped")).unwrap();
        // SAFETY: as above.
        let mut mapping = unsafe { memmap2::MmapMut::map_mut(&file) }.unwrap();
        mapping.copy_from_slice(text.as_bytes());
        drop((mapping, file));
        soon("what was stored", || (fs::read_to_string(world.inside("mapped")).unwrap() == text).then_some(()));
    }
    fs::write(world.behind("mapped"), "0049").unwrap();
    soon("a lease", || (fs::read_to_string(world.inside("mapped")).unwrap() == "0049").then_some(()));
    world.guest.unmount();
}

/// Two pages, so that one may be newer than the other.
fn text(version: u64) -> Vec<u8> {
    format!("{version:016}").repeat(512).into_bytes()
}

fn map(path: &Path) -> Vec<u8> {
    let file = File::open(path).unwrap();
    // SAFETY: nobody writes to the file, or truncates it, meanwhile.
    unsafe { memmap2::Mmap::map(&file) }.unwrap().to_vec()
}

/// Each sees what the other one does.
#[test]
fn two_guests_see_each_other() {
    let Some(world) = World::real("fuse", "ring") else { return };
    let Some(other) = Scratch::new() else { return };
    let second = Guest::mount(&other, world.host(), "channel=fuse");
    for round in 0..20 {
        let (a, b): (&Path, &Path) =
            if round % 2 == 0 { (&world.guest.point, &second.point) } else { (&second.point, &world.guest.point) };
        let name = format!("file-{round}");
        assert!(!b.join(&name).exists());
        fs::write(a.join(&name), &name).unwrap();
        soon("the other one's file", || fs::read_to_string(b.join(&name)).ok().filter(|text| *text == name));
        fs::rename(a.join(&name), a.join("moved")).unwrap();
        soon("its new name", || (b.join("moved").exists() && !b.join(&name).exists()).then_some(()));
        fs::remove_file(a.join("moved")).unwrap();
        soon("that it is gone", || (!b.join("moved").exists()).then_some(()));
    }
    second.unmount();
    world.guest.unmount();
}

/// A host that starts when it is told to. This process cannot start one while it has files open on the mount: a new
/// process closes them first, which waits for a host.
struct NextHost(Option<Child>);

impl NextHost {
    fn new(world: &World) -> NextHost {
        let mut command = Command::new("sh");
        command.args(["-c", "read go && exec \"$@\"", "sh"]).arg(sibling("tunnelfs-host").unwrap());
        command.arg("--socket-path").arg(world.scratch.path("socket"));
        command.arg("--shared-dir").arg(world.scratch.path("share"));
        command.args(["--num-request-queues", "2", "--cache", "coherent"]);
        NextHost(Some(command.stdin(Stdio::piped()).spawn().unwrap()))
    }
}

impl Drop for NextHost {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl World {
    fn host(&self) -> &Host {
        &self._host
    }

    /// Kills the host, does something to the share, and starts another one.
    fn replace_host(&mut self, next: &mut NextHost, meanwhile: impl FnOnce(&Path)) {
        kill(self._host.server(), Signal::SIGKILL).unwrap();
        let _ = self._host.child.kill();
        self._host.child.wait().unwrap();
        let socket = self.scratch.path("socket");
        soon("it is dead", || (!is_listening(&socket)).then_some(()));
        meanwhile(&self.scratch.path("share"));
        next.0.as_mut().unwrap().stdin.take().unwrap().write_all(b"go\n").unwrap();
        soon("the next host listens", || is_listening(&socket).then_some(()));
        self._host = Host::of(next.0.take().unwrap(), socket, self.scratch.path("share"));
    }
}
