use super::*;
use crate::fs::credentials::opens_by_handle;
use std::ffi::{CStr, CString};
use std::fs;
use std::os::fd::AsRawFd;
use std::path::Path;

const LOOK: i32 = libc::O_PATH | libc::O_NOFOLLOW;

fn table(dir: &Path, budget: usize) -> Option<Inodes> {
    if !opens_by_handle() {
        println!("skipped: needs CAP_DAC_READ_SEARCH");
        return None;
    }
    let root = fs::File::open(dir).unwrap();
    Some(Inodes::new(root.into(), budget, true).unwrap())
}

fn look_up(table: &Inodes, name: &CStr) -> io::Result<Arc<Inode>> {
    let dir = table.pin(table.root())?;
    let fd = sys::open_at(dir.as_fd(), name, LOOK, 0)?;
    let st = sys::stat(fd.as_fd())?;
    table.enter(fd, &st, table.root(), name)
}

fn name(number: usize) -> CString {
    CString::new(number.to_string()).unwrap()
}

#[test]
fn more_inodes_than_descriptors_all_answer() {
    let dir = tempfile::tempdir().unwrap();
    let Some(table) = table(dir.path(), 50) else { return };
    let mut known = Vec::new();
    for number in 0..2000 {
        fs::write(dir.path().join(number.to_string()), number.to_string()).unwrap();
        known.push(look_up(&table, &name(number)).unwrap());
        assert!(table.descriptors() <= 63, "{} descriptors", table.descriptors());
    }
    for (number, inode) in known.iter().enumerate().rev() {
        let (found, pin) = table.open(inode.id).unwrap();
        assert!(Arc::ptr_eq(&found, inode));
        assert_eq!(Key::of(&sys::stat(pin.as_fd()).unwrap()), inode.key, "{number}");
        assert_eq!(look_up(&table, &name(number)).unwrap().id, inode.id);
        table.forget(inode.id, 2, false);
        drop(pin);
        assert!(table.descriptors() <= 63);
    }
    drop(known);
    assert_eq!((table.len(), table.descriptors()), (0, 1));
}

#[test]
fn what_is_open_or_unlinked_keeps_its_descriptor() {
    let dir = tempfile::tempdir().unwrap();
    let Some(table) = table(dir.path(), 20) else { return };
    let [open, unlinked] = ["open", "unlinked"].map(|name| {
        fs::write(dir.path().join(name), name).unwrap();
        look_up(&table, &CString::new(name).unwrap()).unwrap()
    });
    let held = table.hold(&open).unwrap();
    fs::remove_file(dir.path().join("unlinked")).unwrap();
    for number in 0..500 {
        fs::write(dir.path().join(number.to_string()), "").unwrap();
        look_up(&table, &name(number)).unwrap();
    }
    assert!(open.pinned().is_some() && unlinked.pinned().is_some());
    assert_eq!(sys::stat(table.pin(&unlinked).unwrap().as_fd()).unwrap().stx_nlink, 0);
    // Removed by others while it was known by its handle alone: that is all that can be said.
    let cold = table.get(look_up(&table, &name(0)).unwrap().id).unwrap();
    table.cool(&cold);
    fs::remove_file(dir.path().join("0")).unwrap();
    assert_eq!(table.pin(&cold).unwrap_err().raw_os_error(), Some(libc::ESTALE));
    drop(held);
    assert_eq!(open.opens.load(Acquire), 0);
}

#[test]
fn a_number_that_is_used_again_is_another_inode() {
    let dir = tempfile::tempdir().unwrap();
    let Some(table) = table(dir.path(), 1000) else { return };
    fs::write(dir.path().join("0"), "").unwrap();
    let old = look_up(&table, &name(0)).unwrap();
    assert!(table.cool(&old));
    // As if the file system had given the inode's number to another file.
    let other = fs::File::create(dir.path().join("other")).unwrap();
    *old.place.write() = Place::Handle(FileHandle::of(other.as_fd()).unwrap());
    let new = look_up(&table, &name(0)).unwrap();
    assert!(new.id != old.id && table.get(old.id).is_ok() && table.get(new.id).is_ok());
    table.forget(old.id, 1, false);
    assert_eq!(table.get(old.id).unwrap_err().raw_os_error(), Some(libc::EBADF));
    assert_eq!(look_up(&table, &name(0)).unwrap().id, new.id);
}

#[test]
fn the_forgotten_come_back_with_their_numbers() {
    let dir = tempfile::tempdir().unwrap();
    let Some(table) = table(dir.path(), 1000) else { return };
    let ids: Vec<u64> = (0..3)
        .map(|number| {
            fs::write(dir.path().join(number.to_string()), "").unwrap();
            let id = look_up(&table, &name(number)).unwrap().id;
            table.forget(id, 1, true);
            id
        })
        .collect();
    assert_eq!(table.len(), 0);
    assert_eq!(table.recall(ids[0]).unwrap().id, ids[0]);
    assert_eq!(look_up(&table, &name(1)).unwrap().id, ids[1], "found by its name first");
    fs::remove_file(dir.path().join("2")).unwrap();
    fs::write(dir.path().join("2"), "").unwrap();
    assert_eq!(table.recall(ids[2]).unwrap_err().raw_os_error(), Some(libc::ESTALE));
    assert_ne!(look_up(&table, &name(2)).unwrap().id, ids[2]);
    assert_eq!(table.recall(12345).unwrap_err().raw_os_error(), Some(libc::ESTALE));
}

#[test]
fn looking_up_and_forgetting_race() {
    let dir = tempfile::tempdir().unwrap();
    let Some(table) = table(dir.path(), 8) else { return };
    const NAMES: usize = 24;
    for number in 0..NAMES {
        fs::write(dir.path().join(number.to_string()), "").unwrap();
    }
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (table, dir) = (&table, dir.path());
            scope.spawn(move || {
                for round in 0..2000 {
                    let number = (round * (thread + 1)) % NAMES;
                    if thread == 3 {
                        // Replaces the file, as an editor does.
                        let new = dir.join(format!("new-{number}"));
                        fs::write(&new, "").unwrap();
                        fs::rename(&new, dir.join(number.to_string())).unwrap();
                        continue;
                    }
                    let inode = match look_up(table, &name(number)) {
                        Ok(inode) => inode,
                        Err(e) if e.raw_os_error() == Some(libc::ENFILE) => continue,
                        Err(e) => panic!("{e}"),
                    };
                    // Known until this thread forgets it; its file may have been replaced meanwhile.
                    match table.open(inode.id) {
                        Ok((_, pin)) => assert!(pin.as_fd().as_raw_fd() > 0),
                        Err(e) => assert_eq!(e.raw_os_error(), Some(libc::ESTALE)),
                    }
                    table.forget(inode.id, 1, round % 3 == 0);
                }
            });
        }
    });
    assert_eq!((table.len(), table.descriptors()), (0, 1));
}

#[test]
fn a_guest_that_forgets_too_much_forgets_no_more_than_there_is() {
    let dir = tempfile::tempdir().unwrap();
    let Some(table) = table(dir.path(), 8) else { return };
    fs::write(dir.path().join("0"), "").unwrap();
    let inode = look_up(&table, &name(0)).unwrap();
    table.forget(inode.id, u64::MAX, false);
    table.forget(inode.id, u64::MAX, true);
    table.forget(ROOT_ID, u64::MAX, false);
    table.forget(4711, 1, true);
    assert!(table.get(ROOT_ID).is_ok() && table.get(inode.id).is_err());
}

#[test]
fn looking_up_and_forgetting_for_ever_takes_no_memory() {
    let dir = tempfile::tempdir().unwrap();
    let Some(table) = table(dir.path(), 1000) else { return };
    fs::write(dir.path().join("0"), "").unwrap();
    for _ in 0..5000 {
        let inode = look_up(&table, &name(0)).unwrap();
        table.forget(inode.id, 1, true);
    }
    assert!(table.clock_len() < 1100, "{}", table.clock_len());
}

#[test]
fn space_of_what_is_gone_is_given_back_when_it_is_wanted() {
    let dir = tempfile::tempdir().unwrap();
    let Some(table) = table(dir.path(), 1000) else { return };
    let [gone, open, there] = [0, 1, 2].map(|number| {
        fs::write(dir.path().join(number.to_string()), "").unwrap();
        look_up(&table, &name(number)).unwrap()
    });
    let held = table.hold(&open).unwrap();
    assert!(!table.reclaim(true), "nothing was removed");
    for number in ["0", "1"] {
        fs::remove_file(dir.path().join(number)).unwrap();
        table.removed();
    }
    assert!(table.reclaim(true) && !table.reclaim(true));
    assert_eq!([&gone, &open, &there].map(|inode| inode.pinned().is_some()), [false, true, true]);
    assert_eq!(table.pin(&gone).unwrap_err().raw_os_error(), Some(libc::ESTALE));
    // A program in the guest has closed it; RELEASE is on its way.
    table.removed();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(CLOSING / 10);
            drop(held);
        });
        assert!(table.reclaim(true));
    });
    assert!(open.pinned().is_none());
}
