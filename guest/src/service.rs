//! A mount with a thread of its own, for programs that embed a mount.
//!
//! ```no_run
//! use tunnelfs_guest::fuse::device::MountOptions;
//! use tunnelfs_guest::mount::MountConfig;
//! use tunnelfs_guest::{Event, Service};
//!
//! let mut settings = tunnelfs_settings::Settings::default();
//! settings.transport.socket_path = "/run/tfs.sock".into();
//! let config = MountConfig::new(&settings, "/mnt".as_ref(), MountOptions::default());
//! let service = Service::start(&config, |event| match event {
//!     Event::Mounted => println!("mounted"),
//!     Event::HostLost => println!("the host has gone"),
//!     Event::HostBack { after } => println!("another host, after {after:?}"),
//!     Event::Ended(result) => println!("ended: {result:?}"),
//! })?;
//! println!("{}", std::fs::read_to_string("/mnt/hello")?);
//! service.unmount()?;
//! service.wait();
//! # Ok::<(), tunnelfs_guest::Error>(())
//! ```

use crate::connect::Connection;
use crate::error::Error;
use crate::events::{Event, Listener};
use crate::fuse::device;
use crate::mount::{Mount, MountConfig};
use crate::stats::{self, QueueStats};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use tunnelfs_ring::LiveWait;

/// A mount, and the thread that waits for its end. Dropping it unmounts, without waiting for the end; [`Service::wait`]
/// waits.
pub struct Service {
    point: PathBuf,
    description: String,
    wait: LiveWait,
    queues: Vec<(&'static str, u32, Arc<QueueStats>)>,
    thread: Option<JoinHandle<()>>,
}

impl Service {
    /// Connects to the host that `config` names, and mounts. Reports [`Event::Mounted`] before it returns.
    ///
    /// # Errors
    /// As [`Mount::new`].
    pub fn start(config: &MountConfig, on_event: impl Fn(Event) + Send + Sync + 'static) -> Result<Service, Error> {
        Service::mount(config, on_event, Mount::new)
    }

    /// Mounts over an open connection: from [`connect`](crate::connect()), from [`connect_over`](crate::connect_over),
    /// or with transports of your own.
    ///
    /// # Errors
    /// As [`Mount::new`].
    pub fn with_connection(
        connection: Connection,
        config: &MountConfig,
        on_event: impl Fn(Event) + Send + Sync + 'static,
    ) -> Result<Service, Error> {
        Service::mount(config, on_event, |config| Mount::with_connection(connection, config))
    }

    fn mount(
        config: &MountConfig,
        on_event: impl Fn(Event) + Send + Sync + 'static,
        mount: impl FnOnce(&MountConfig) -> Result<Mount, Error>,
    ) -> Result<Service, Error> {
        let listener = Listener::new(on_event);
        let mount = mount(&MountConfig { listener: listener.clone(), ..config.clone() })?;
        let mut service = Service {
            point: mount.point.clone(),
            description: mount.describe(),
            wait: mount.wait.clone(),
            queues: mount.queues.clone(),
            thread: None,
        };
        let thread = tunnelfs_program::thread::spawn("mount", move || {
            wait_for_exit(&mount);
            listener.tell(Event::Ended(mount.finish()));
        })?;
        service.thread = Some(thread);
        Ok(service)
    }

    /// Describes in one line what was negotiated.
    pub fn describe(&self) -> &str {
        &self.description
    }

    /// Returns the statistics so far, as a table.
    pub fn statistics(&self) -> String {
        stats::render(self.wait.get().policy, &self.queues)
    }

    /// Unmounts. A busy mount is detached, and ends with its last user.
    ///
    /// # Errors
    /// The system's.
    pub fn unmount(&self) -> std::io::Result<()> {
        device::unmount(&self.point)
    }

    /// Waits until the mount has ended and the callback for [`Event::Ended`] has returned. Does not unmount.
    pub fn wait(mut self) {
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if self.thread.as_ref().is_some_and(|thread| !thread.is_finished()) {
            let _ = self.unmount();
        }
    }
}

fn wait_for_exit(mount: &Mount) {
    let mut fds = [PollFd::new(mount.exit_fd(), PollFlags::POLLIN)];
    while poll(&mut fds, PollTimeout::NONE).is_err() {}
}
