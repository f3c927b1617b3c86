//! What a hostile host can tell of nodes.

use super::tests::{dir, file, linked};
use super::*;

/// Each directory has two names, in both directories of the level above: twice as many ways up with each level.
#[test]
fn a_web_of_a_lying_host_is_searched_once() {
    let mut nodes = InodeTable::default();
    for level in 2..100 {
        for (node, parent) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let (node, parent) = (2 * level + node, 2 * level - 2 + parent);
            let links = Entry { links: 2, ..file(node, node) };
            nodes.insert(parent, Some(format!("{node} in {parent}").as_bytes()), &links);
        }
    }
    for parent in [ROOT, 198, 199] {
        let links = Entry { links: 3, ..file(200, 200) };
        nodes.insert(parent, Some(format!("in {parent}").as_bytes()), &links);
    }
    nodes.next_host(true);
    assert_eq!(nodes.translate(198), Err(Unresolved::Stale));
    // A way beside the web is found, which is the last that is tried.
    assert!(matches!(nodes.translate(200), Err(Unresolved::Lookup { parent: ROOT, child: 200, .. })));
    // With a way out at its end it is found.
    nodes.link(4, ROOT, b"way", false);
    assert!(matches!(nodes.translate(198), Err(Unresolved::Lookup { parent: ROOT, child: 4, .. })));
}

#[test]
fn a_long_way_has_an_end() {
    let mut nodes = InodeTable::default();
    let count = 2 * MAX_LOOKS as u64;
    for n in 0..count {
        nodes.insert(n + 1, Some(b"d"), &dir(n + 2, n + 2));
    }
    nodes.next_host(true);
    assert!(matches!(nodes.translate(2_000), Err(Unresolved::Lookup { parent: ROOT, child: 2, .. })));
    assert_eq!(nodes.translate(count), Err(Unresolved::Stale));
}

#[test]
fn one_number_of_a_file_for_all_is_not_searched_for_ever() {
    let mut nodes = InodeTable::default();
    for n in 2..1_000 {
        nodes.insert(ROOT, Some(n.to_string().as_bytes()), &linked(n, 7));
    }
    assert!(nodes.linked[&7].len() <= MAX_ALIASES);
}

#[test]
fn circles_of_a_lying_host_end() {
    let mut nodes = InodeTable::default();
    nodes.insert(2, Some(b"a"), &dir(3, 30));
    nodes.insert(3, Some(b"b"), &dir(2, 20));
    nodes.insert(5, Some(b"x"), &dir(5, 50));
    nodes.insert(77, Some(b"x"), &file(6, 60));
    nodes.next_host(true);
    assert_eq!([2, 3, 5, 6].map(|n| nodes.translate(n)), [const { Err(Unresolved::Stale) }; 4]);
    (2..6).for_each(|n| assert_eq!(nodes.forget(n, 9), None));
}
