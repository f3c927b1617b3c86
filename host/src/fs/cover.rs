//! By which marks an inode's names and attributes are watched.

use parking_lot::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::*};
use std::sync::Arc;

/// A mark on an inode, as long as it is alive. One that was set anew is another one.
#[derive(Debug)]
pub struct Watch {
    alive: AtomicBool,
    /// Whether it was of use since the clock's hand has passed.
    used: AtomicBool,
}

impl Watch {
    pub fn new() -> Arc<Watch> {
        Arc::new(Watch { alive: AtomicBool::new(true), used: AtomicBool::new(true) })
    }

    /// Whether changes are still reported.
    pub fn is_alive(&self) -> bool {
        self.alive.load(Acquire)
    }

    /// No answer may count on it any more.
    pub fn end(&self) {
        self.alive.store(false, SeqCst);
    }

    fn touch(&self) {
        if !self.used.load(Relaxed) {
            self.used.store(true, Relaxed);
        }
    }

    /// Whether it was of use since the last call.
    pub fn take_used(&self) -> bool {
        self.used.swap(false, Relaxed)
    }
}

/// What is known of an inode's marks.
#[derive(Debug, Default)]
pub struct Cover {
    /// The mark on the inode itself.
    own: Mutex<Option<Arc<Watch>>>,
    /// The mark on the directory that it was last found in.
    parent: Mutex<Option<Arc<Watch>>>,
    /// The inode has been seen with several names: no directory's mark sees all changes.
    linked: AtomicBool,
}

impl Cover {
    /// The mark on the inode itself, if it is alive.
    pub fn own(&self) -> Option<Arc<Watch>> {
        let own = self.own.lock().clone().filter(|watch| watch.is_alive())?;
        own.touch();
        Some(own)
    }

    /// The inode has been marked.
    pub fn set_own(&self, watch: Arc<Watch>) {
        *self.own.lock() = Some(watch);
    }

    /// The inode was found in a directory with this mark, or in one without.
    pub fn found_in(&self, parent: Option<Arc<Watch>>) {
        *self.parent.lock() = parent;
    }

    /// The inode has several names.
    pub fn set_linked(&self) {
        self.linked.store(true, Relaxed);
    }

    /// Whether the inode has been seen with several names.
    pub fn is_linked(&self) -> bool {
        self.linked.load(Relaxed)
    }

    /// Whether the mark of the directory that the inode was found in reports changes of its attributes.
    pub fn by_parent(&self) -> bool {
        !self.is_linked() && self.parent.lock().as_ref().is_some_and(|watch| watch.is_alive())
    }
}
