//! The guests of this process that listen. fanotify does not tell what one of them has changed from what another has:
//! all of it is this process's own. So each listener leaves the process's own changes out, and who makes one tells
//! the others.

use super::listener::{Happening, Listener};
use parking_lot::RwLock;
use std::sync::atomic::{AtomicUsize, Ordering::*};
use std::sync::Arc;

static ALL: RwLock<Vec<Arc<Listener>>> = RwLock::new(Vec::new());
/// How many there are, to see at once that there are no others.
static COUNT: AtomicUsize = AtomicUsize::new(0);

/// A guest listens from now on.
pub fn add(listener: &Arc<Listener>) {
    let mut all = ALL.write();
    all.push(listener.clone());
    COUNT.store(all.len(), SeqCst);
}

/// A guest listens no more.
pub fn remove(listener: &Arc<Listener>) {
    let mut all = ALL.write();
    all.retain(|one| !Arc::ptr_eq(one, listener));
    COUNT.store(all.len(), SeqCst);
}

/// Whether there may be others than `own`.
pub fn are_there(own: bool) -> bool {
    COUNT.load(SeqCst) > usize::from(own)
}

/// Tells all but `own`.
pub fn tell(own: Option<&Arc<Listener>>, what: &Happening<'_>) {
    for one in ALL.read().iter() {
        if !own.is_some_and(|own| Arc::ptr_eq(own, one)) {
            one.told(what);
        }
    }
}
