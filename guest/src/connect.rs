//! Connects to a host. Only this module combines links with transports.

use crate::config::GuestConfig;
use crate::error::Error;
use crate::link::memory::{changes_geometry, hiprio_geometry};
use crate::link::{local, pci, Link};
use crate::timeout::{self, Opened};
use crate::transport::{ring, socket, virtqueue, Transport};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;
use tunnelfs_ring::Region;
use tunnelfs_settings::TransportKind;

/// Most time for a host to set up a connection that the caller has opened.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The queues of a connection.
pub struct Connection {
    /// The hiprio queue, for FORGET and INTERRUPT beside FUSE-over-io_uring.
    pub hiprio: Box<dyn Transport>,
    /// The request queues.
    pub queues: Vec<Box<dyn Transport>>,
    /// The queue for OP_CHANGES; `None` if the host has no queue beside the request queues.
    pub changes: Option<Box<dyn Transport>>,
    /// The memory that the next connection can take over; `None` if none can.
    pub retained: Option<RetainedMemory>,
}

/// The memory of a connection, which the next connection gets too: its slots may hold requests that are still to be
/// sent.
#[derive(Clone)]
pub enum RetainedMemory {
    /// Memory that is shared with a host.
    Shared(Arc<local::Memory>),
    /// The slots of each socket queue: of the hiprio queue first, of the queue for changes last.
    Private(Vec<Arc<Region>>),
}

/// Connects to a host, with one transport per request queue.
///
/// # Errors
/// [`Error::Connect`] if no host serves the socket, [`Error::Setup`] if the device or a CPU is not available,
/// [`Error::Ring`] if a size is out of range or there is no memory.
pub fn connect(config: &GuestConfig) -> Result<Connection, Error> {
    connect_under(config, &Opened::default())
}

/// As [`connect`], over a vhost-user connection that the caller has opened. The socket's path is used only for a later
/// reconnect. The host has five seconds to set up the connection.
///
/// # Errors
/// As [`connect`]; [`Error::Setup`] if `config` names a PCI device or the socket transport.
pub fn connect_over(stream: UnixStream, config: &GuestConfig) -> Result<Connection, Error> {
    if config.pci.is_some() || config.transport == TransportKind::Socket {
        let why = "a connection that is given must be a vhost-user one: transport ring or virtqueue, and no PCI device";
        return Err(Error::Setup(why.into()));
    }
    timeout::with_opened(CONNECT_TIMEOUT, &config.socket_path, Opened::with(stream), |opened| {
        connect_under(config, opened)
    })
}

/// As [`connect`]; `opened` collects the connections, to shut them down at a deadline.
pub(crate) fn connect_under(config: &GuestConfig, opened: &Opened) -> Result<Connection, Error> {
    config.geometry.check()?;
    config.check_cpus()?;
    let (link, retained, count, changes) = match &config.pci {
        Some(target) => pci::open(config, target).map(|(link, count, changes)| (link, None, count, changes))?,
        None if config.transport == TransportKind::Socket => return connect_socket(config, opened),
        None => {
            let (link, memory) = local::open(config, None, opened)?;
            let (count, changes) = (memory.count(), memory.has_changes());
            (link, Some(RetainedMemory::Shared(memory)), count, changes)
        }
    };
    let drivers = (0..count).map(|i| virtqueue_driver(&link, i, config)).collect();
    Ok(Connection { retained, ..upgrade(drivers, changes, config)? })
}

/// Connects to another host with the memory of an earlier connection. `handshake` sends the first requests; these use a
/// set-up buffer, and leave the slots as they are.
///
/// # Errors
/// As [`connect`]; [`Error::Refused`] if this host cannot take over.
pub(crate) fn connect_again(
    config: &GuestConfig,
    retained: &RetainedMemory,
    opened: &Opened,
    handshake: impl FnOnce(&mut dyn Transport) -> Result<(), Error>,
) -> Result<Connection, Error> {
    let memory = match retained {
        RetainedMemory::Shared(memory) => memory,
        RetainedMemory::Private(regions) => return connect_socket_again(config, regions, opened, handshake),
    };
    let (link, memory) = local::open(config, Some(memory.clone()), opened)?;
    let mut drivers: Vec<_> =
        (0..memory.count()).map(|i| virtqueue_driver(&link, i, config).beside_the_slots()).collect();
    handshake(&mut drivers[1])?;
    Ok(Connection { retained: Some(retained.clone()), ..upgrade(drivers, memory.has_changes(), config)? })
}

/// Makes the driver of a virtqueue. The hiprio queue never spins.
fn virtqueue_driver(link: &Arc<dyn Link>, index: usize, config: &GuestConfig) -> virtqueue::VirtqueueTransport {
    let driver = virtqueue::VirtqueueTransport::new(link.clone(), index, &config.wait);
    if index == 0 {
        driver.parking()
    } else {
        driver
    }
}

/// Replaces the request queues' virtqueues with rings, if `config` asks for rings and the host supports them. `changes`
/// says whether the last virtqueue is for changes.
fn upgrade(
    mut drivers: Vec<virtqueue::VirtqueueTransport>,
    changes: bool,
    config: &GuestConfig,
) -> Result<Connection, Error> {
    let changes = if changes { drivers.pop() } else { None };
    let changes = changes.map(|driver| Box::new(driver.parking().settled()) as Box<dyn Transport>);
    let count = drivers.len() - 1;
    let transports = drivers.into_iter().enumerate().map(|(i, driver)| match config.transport {
        TransportKind::Ring if i > 0 => ring::upgrade(driver, &config.wait, config.cpu(i - 1, count)),
        _ => Ok(Box::new(driver.settled()) as Box<dyn Transport>),
    });
    let mut queues = transports.collect::<Result<Vec<_>, _>>()?;
    Ok(Connection { hiprio: queues.remove(0), queues, changes, retained: None })
}

fn connect_socket(config: &GuestConfig, opened: &Opened) -> Result<Connection, Error> {
    let token = socket::new_token()?;
    let control = socket::connect(config, hiprio_geometry(config.geometry), None, opened)?.join(&token)?;
    let queues = (0..config.queues).map(|_| socket::connect(config, config.geometry, None, opened)?.join(&token));
    let queues = queues.collect::<Result<Vec<_>, _>>()?;
    let changes = socket::connect(config, changes_geometry(config.geometry), None, opened)?.join(&token)?;
    let all = std::iter::once(&control).chain(&queues).chain([&changes]);
    let regions = all.map(|driver| driver.memory().clone()).collect();
    let queues = queues.into_iter().map(|driver| driver as Box<dyn Transport>).collect();
    Ok(Connection { hiprio: control, queues, changes: Some(changes), retained: Some(RetainedMemory::Private(regions)) })
}

fn connect_socket_again(
    config: &GuestConfig,
    regions: &[Arc<Region>],
    opened: &Opened,
    handshake: impl FnOnce(&mut dyn Transport) -> Result<(), Error>,
) -> Result<Connection, Error> {
    let [of_hiprio, of_first, of_others @ .., of_changes] = regions else {
        return Err(Error::Protocol("no memory to go on with"));
    };
    let token = socket::new_token()?;
    let connect =
        |geometry, region: &Arc<Region>| socket::connect(config, geometry, Some(region.clone()), opened)?.join(&token);
    let control = connect(hiprio_geometry(config.geometry), of_hiprio)?;
    // The handshake uses private memory, but a connection that stays: a host drops its state with the last connection.
    let mut first = socket::connect(config, config.geometry, None, opened)?.join(&token)?;
    handshake(first.as_mut())?;
    let mut queues: Vec<Box<dyn Transport>> = vec![Box::new(first.with_memory(of_first.clone()))];
    for region in of_others {
        queues.push(connect(config.geometry, region)?);
    }
    let changes = connect(changes_geometry(config.geometry), of_changes)?;
    let retained = Some(RetainedMemory::Private(regions.to_vec()));
    Ok(Connection { hiprio: control, queues, changes: Some(changes), retained })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tunnelfs_settings::Settings;

    #[test]
    fn cpus_that_cannot_be_had_are_refused() {
        let mut config = GuestConfig::from(&Settings::default());
        assert!(config.check_cpus().is_ok());
        let here = tunnelfs_ring::allowed_cpus()[0];
        config.cpus = vec![here, here];
        assert!(config.check_cpus().is_ok());
        for cpu in [1023, 1 << 20, usize::MAX] {
            config.cpus = vec![here, cpu];
            // Before anybody is connected to.
            let refused = connect(&config).map(drop).unwrap_err().to_string();
            assert!(refused.contains(&format!("no CPU {cpu}")), "{refused}");
        }
    }
}
