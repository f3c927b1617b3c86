//! Notifications to the kernel: messages without a request (`enum fuse_notify_code` of linux/fuse.h).

use crate::fuse::message::OUT_HEADER;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

const INVAL_INODE: i32 = 2;
const INVAL_ENTRY: i32 = 3;
/// Linux 6.16 and later.
const INC_EPOCH: i32 = 8;

/// Result of a notification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotifyResult {
    /// The kernel has carried it out.
    Done,
    /// The kernel does not have the inode or the name, or has failed.
    Unknown,
    /// The kernel does not support this kind of notification.
    Unsupported,
    /// The mount has ended.
    Ended,
}

/// Part of a cached inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// The attributes. Dropping them never blocks.
    Attributes,
    /// The attributes and the data. Dropping them blocks while a READ is in flight.
    Data,
}

/// A mounted connection.
#[derive(Clone)]
pub struct Kernel(pub Arc<OwnedFd>);

impl Kernel {
    /// Drops an inode's attributes from the kernel's cache, or its data too.
    pub fn invalidate_inode(&self, node: u64, part: Part) -> NotifyResult {
        // `fuse_notify_inval_inode_out`: a negative offset keeps the data.
        let offset = match part {
            Part::Attributes => -1i64,
            Part::Data => 0,
        };
        let body = [node.to_ne_bytes(), offset.to_ne_bytes(), 0i64.to_ne_bytes()].concat();
        self.send(INVAL_INODE, &body)
    }

    /// Drops a name, or a negative entry, from the kernel's cache. Blocks while another thread holds the directory's
    /// lock.
    pub fn invalidate_name(&self, parent: u64, name: &[u8]) -> NotifyResult {
        // `fuse_notify_inval_entry_out`, without flags: FUSE_EXPIRE_ONLY would lose against a LOOKUP in flight.
        let mut body = parent.to_ne_bytes().to_vec();
        body.extend((name.len() as u32).to_ne_bytes());
        body.extend(0u32.to_ne_bytes());
        body.extend(name);
        body.push(0);
        self.send(INVAL_ENTRY, &body)
    }

    /// Expires all names in the kernel's cache: the kernel looks each up again on its next use.
    pub fn invalidate_names(&self) -> NotifyResult {
        self.send(INC_EPOCH, &[])
    }

    fn send(&self, code: i32, body: &[u8]) -> NotifyResult {
        let mut message = ((OUT_HEADER + body.len()) as u32).to_ne_bytes().to_vec();
        message.extend(code.to_ne_bytes());
        message.extend(0u64.to_ne_bytes());
        message.extend(body);
        loop {
            return match nix::unistd::write(self.0.as_fd(), &message) {
                Ok(_) => NotifyResult::Done,
                Err(nix::Error::EINTR) => continue,
                Err(nix::Error::ENOENT | nix::Error::ENOTDIR) => NotifyResult::Unknown,
                Err(nix::Error::EINVAL) => NotifyResult::Unsupported,
                Err(nix::Error::ENODEV | nix::Error::ENOTCONN | nix::Error::ECONNABORTED) => NotifyResult::Ended,
                Err(e) => {
                    tracing::debug!("the kernel refuses notification {code}: {}", io::Error::from(e));
                    NotifyResult::Unknown
                }
            };
        }
    }
}
