//! What the driver's side gives to the device's side, once.

use crate::error::Error;
use crate::geometry::Geometry;
use nix::sys::socket::{recvmsg, sendmsg, ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr};
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// First bytes of the message, with the version of the hand-off.
const MAGIC: [u8; 4] = *b"TFH1";
/// The magic, then entries, slots and slot size, little-endian.
const BYTES: usize = 16;
/// Descriptors of a hand-off.
const FDS: usize = 4;

/// One queue's memory and descriptors, on their way to the device.
#[derive(Debug)]
pub struct Handoff {
    /// The region: a memfd that can neither shrink nor grow.
    pub memory: OwnedFd,
    /// Eventfd that the device sleeps on.
    pub kick: OwnedFd,
    /// Eventfd that the driver sleeps on.
    pub call: OwnedFd,
    /// The device's end of a socket pair that hangs up when either side goes.
    pub alive: OwnedFd,
    /// The queue's sizes, as the driver was created with.
    pub geometry: Geometry,
}

impl Handoff {
    /// Sends the hand-off to another process. This process keeps no descriptor of it. Until the other one has received
    /// it, the device counts as alive as long as any copy of the socket's other end is open: close yours before you wait
    /// (also the [`std::process::Command`] that it was given to as `stdin` has one).
    ///
    /// # Errors
    /// [`Error::Os`] when the socket cannot take it.
    pub fn send(self, socket: &UnixStream) -> Result<(), Error> {
        let g = self.geometry;
        let mut bytes = MAGIC.to_vec();
        [g.entries, g.slots, g.slot_size].into_iter().for_each(|n| bytes.extend_from_slice(&n.to_le_bytes()));
        let fds = [&self.memory, &self.kick, &self.call, &self.alive].map(AsRawFd::as_raw_fd);
        let rights = [ControlMessage::ScmRights(&fds)];
        let sent = sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&bytes)], &rights, MsgFlags::MSG_NOSIGNAL, None);
        match sent {
            Ok(BYTES) => Ok(()),
            Ok(_) => Err(Error::Handoff("it was sent in part")),
            Err(e) => Err(os("sending the hand-off", e)),
        }
    }

    /// Receives a hand-off, and waits for it as long as the socket's read timeout says. It takes the hand-off's bytes
    /// alone: other bytes may follow on the socket, not come before. [`Device::attach`](crate::Device::attach) checks what
    /// it says.
    ///
    /// # Errors
    /// [`Error::PeerGone`] at the end of the stream, [`Error::TimedOut`] after the socket's timeout, [`Error::Handoff`] for
    /// something else than a hand-off, and [`Error::Os`] when the socket cannot be read.
    pub fn recv(socket: &UnixStream) -> Result<Handoff, Error> {
        let mut bytes = [0; BYTES];
        let mut space = nix::cmsg_space!([i32; FDS]);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags).map_err(|e| {
            if e == nix::Error::EAGAIN {
                Error::TimedOut
            } else {
                os("receiving the hand-off", e)
            }
        })?;
        let received = message.bytes;
        let mut fds = Vec::new();
        for part in message.cmsgs().map_err(|e| os("receiving the hand-off", e))? {
            if let ControlMessageOwned::ScmRights(rights) = part {
                // SAFETY: the kernel has just made these descriptors for this process; nobody else knows them.
                fds.extend(rights.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        if received == 0 {
            return Err(Error::PeerGone);
        }
        let fds: Result<[OwnedFd; FDS], _> = fds.try_into();
        let (Ok([memory, kick, call, alive]), true) = (fds, received == BYTES && bytes.starts_with(&MAGIC)) else {
            return Err(Error::Handoff("it is not one of this version"));
        };
        let word = |i: usize| u32::from_le_bytes([0, 1, 2, 3].map(|b| bytes[4 * i + b]));
        let geometry = Geometry { entries: word(1), slots: word(2), slot_size: word(3) };
        Ok(Handoff { memory, kick, call, alive, geometry })
    }
}

fn os(what: &str, e: nix::Error) -> Error {
    Error::Os { what: what.into(), source: e.into() }
}
