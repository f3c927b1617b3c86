use super::*;

pub fn file(node: u64, ino: u64) -> Entry {
    Entry { node, identity: Identity { ino, kind: libc::S_IFREG, rdev: 0 }, links: 1 }
}

pub fn dir(node: u64, ino: u64) -> Entry {
    Entry { identity: Identity { kind: libc::S_IFDIR, ..file(node, ino).identity }, ..file(node, ino) }
}

pub fn linked(node: u64, ino: u64) -> Entry {
    Entry { links: 2, ..file(node, ino) }
}

/// `d` is 2, `d/f` is 3; then another host comes.
fn after_a_host() -> InodeTable {
    let mut nodes = InodeTable::default();
    assert_eq!(nodes.insert(ROOT, Some(b"d"), &dir(2, 20)), 2);
    assert_eq!(nodes.insert(2, Some(b"f"), &file(3, 30)), 3);
    assert_eq!((nodes.translate(2), nodes.translate(99)), (Ok(2), Ok(99)));
    nodes.next_host(true);
    nodes
}

/// Answers questions from a list of (parent, name, entry) until a node is known, or gone.
fn walk(nodes: &mut InodeTable, node: u64, host: &[(u64, &str, Entry)]) -> Option<u64> {
    for _ in 0..100 {
        let (parent, child, name) = match nodes.translate(node) {
            Ok(host) => return Some(host),
            Err(Unresolved::Stale) => return None,
            Err(Unresolved::Lookup { parent, child, name }) => (parent, child, name),
        };
        let entry = host.iter().find(|(p, n, _)| *p == parent && n.as_bytes() == &*name).map(|(_, _, e)| *e);
        nodes.resolved(child, &name, entry.as_ref());
    }
    panic!("it goes on for ever");
}

#[test]
fn a_node_is_found_by_its_path() {
    let mut nodes = after_a_host();
    assert_eq!(nodes.translate(ROOT), Ok(ROOT));
    assert_eq!(nodes.translate(0), Ok(0));
    assert_eq!(nodes.translate(2), Err(Unresolved::Lookup { parent: ROOT, child: 2, name: b"d"[..].into() }));
    assert_eq!(walk(&mut nodes, 3, &[(ROOT, "d", dir(7, 20)), (7, "f", file(9, 30))]), Some(9));
    assert_eq!(nodes.translate(2), Ok(7));
    // The host of the third time numbers anew.
    nodes.next_host(true);
    assert_eq!(walk(&mut nodes, 3, &[(ROOT, "d", dir(3, 20)), (3, "f", file(2, 30))]), Some(2));
}

#[test]
fn another_file_or_none_is_stale() {
    for answers in [
        &[][..],
        &[(ROOT, "d", dir(7, 21))],
        &[(ROOT, "d", dir(7, 20))],
        &[(ROOT, "d", dir(7, 20)), (7, "f", file(9, 31))],
        &[(ROOT, "d", dir(7, 20)), (7, "f", dir(9, 30))],
        &[(ROOT, "d", dir(7, 20)), (7, "f", file(ROOT, 30))],
    ] {
        assert_eq!(walk(&mut after_a_host(), 3, answers), None, "{answers:?}");
    }
    let mut nodes = after_a_host();
    nodes.next_host(false);
    assert_eq!((nodes.translate(ROOT), nodes.translate(3)), (Err(Unresolved::Stale), Err(Unresolved::Stale)));
}

#[test]
fn what_is_deleted_stays_stale_and_what_is_renamed_is_found() {
    let mut nodes = InodeTable::default();
    for (name, node) in [(&b"a"[..], 2), (b"b", 3), (b"c", 4)] {
        nodes.insert(ROOT, Some(name), &file(node, node * 10));
    }
    nodes.removed(ROOT, b"a");
    nodes.renamed((ROOT, b"b"), (ROOT, b"c"), false);
    nodes.next_host(true);
    let host = [(ROOT, "a", file(5, 20)), (ROOT, "c", file(6, 30))];
    assert_eq!([2, 3, 4].map(|n| walk(&mut nodes, n, &host)), [None, Some(6), None]);
}

#[test]
fn names_that_change_places_and_names_in_doubt() {
    let mut nodes = InodeTable::default();
    for (name, node) in [(&b"a"[..], 2), (b"b", 3), (b"c", 4)] {
        nodes.insert(ROOT, Some(name), &file(node, node * 10));
    }
    nodes.renamed((ROOT, b"a"), (ROOT, b"b"), true);
    nodes.maybe_renamed((ROOT, b"c"), (ROOT, b"d"));
    for (now, other) in [("c", "d"), ("d", "c")] {
        nodes.next_host(true);
        let host =
            [(ROOT, "a", file(5, 30)), (ROOT, "b", file(6, 20)), (ROOT, now, file(7, 40)), (ROOT, other, file(8, 1))];
        assert_eq!([2, 3, 4].map(|n| walk(&mut nodes, n, &host)), [Some(6), Some(5), Some(7)]);
    }
}

#[test]
fn a_file_of_two_names_has_one_number() {
    let mut nodes = InodeTable::default();
    nodes.insert(ROOT, Some(b"a"), &linked(2, 20));
    nodes.next_host(true);
    // The other name comes first: whoever asks is told to look the first one up.
    let other = linked(8, 20);
    assert_eq!(nodes.alias(&other), Some(2));
    assert_eq!(walk(&mut nodes, 2, &[(ROOT, "a", linked(8, 20))]), Some(8));
    assert_eq!(nodes.alias(&other), None);
    assert_eq!(nodes.insert(ROOT, Some(b"b"), &other), 2);
    // One of its names is gone: the other one does.
    nodes.removed(ROOT, b"b");
    nodes.next_host(true);
    assert_eq!(walk(&mut nodes, 2, &[(ROOT, "a", linked(1_000, 20))]), Some(1_000));
}

#[test]
fn new_files_get_numbers_that_nobody_has() {
    let mut nodes = after_a_host();
    let new = nodes.insert(ROOT, Some(b"n"), &file(3, 50));
    assert!(![2, 3].contains(&new));
    assert_eq!(nodes.translate(new), Ok(3));
    // Known by its name, it keeps its number.
    assert_eq!(nodes.insert(ROOT, Some(b"d"), &dir(4, 20)), 2);
    assert_eq!(nodes.insert(ROOT, Some(b"n"), &file(3, 50)), new);
    // As many as the host has given out.
    assert_eq!(nodes.forget(new, 1), None);
    assert_eq!(nodes.forget(new, 1), Some(HostInode { node: 3, lookups: 2 }));
    assert_eq!(nodes.forget(new, 1), None);
    assert_ne!(nodes.insert(ROOT, Some(b"n"), &file(3, 50)), new);
}

#[test]
fn what_the_kernel_forgets_is_forgotten() {
    let mut nodes = InodeTable::default();
    nodes.insert(ROOT, Some(b"d"), &dir(2, 20));
    nodes.insert(2, Some(b"e"), &dir(3, 30));
    nodes.insert(3, Some(b"f"), &file(4, 40));
    assert_eq!(nodes.forget(2, 1), Some(HostInode { node: 2, lookups: 1 }));
    assert_eq!(nodes.forget(3, 1), Some(HostInode { node: 3, lookups: 1 }));
    // The path is still needed.
    nodes.next_host(true);
    let host = [(ROOT, "d", dir(7, 20)), (7, "e", dir(8, 30)), (8, "f", file(9, 40))];
    assert_eq!(walk(&mut nodes, 4, &host), Some(9));
    assert_eq!(nodes.forget(4, 1), Some(HostInode { node: 9, lookups: 1 }));
    assert_eq!(nodes.pending_forgets(), [8, 7].map(|node| HostInode { node, lookups: 1 }));
    assert_eq!(nodes.len(), 1, "the root");
    let numbers = [(); 3].map(|()| nodes.insert(ROOT, Some(b"x"), &file(50, 5)));
    assert_eq!(numbers, [numbers[0]; 3]);
    nodes.forget(1 << 60, 1);
    nodes.next_host(true);
    nodes.forget(numbers[0], u64::MAX);
    assert_eq!(nodes.len(), 1);
}
