//! A program with a mount of its own, over a connection that it has made itself.
//!
//! ```text
//! tunnelfs-host --socket-path /run/tfs.sock --shared-dir /srv &
//! cargo run -p tunnelfs-guest --example mount -- /run/tfs.sock /mnt
//! ```
//!
//! Tells what becomes of the mount, and unmounts when its standard input ends.

use std::io::Read;
use std::os::unix::net::UnixStream;
use tunnelfs_guest::fuse::device::MountOptions;
use tunnelfs_guest::mount::MountConfig;
use tunnelfs_guest::{connect_over, Error, Event, Service};
use tunnelfs_settings::Settings;

fn on_event(event: Event) {
    match event {
        Event::Mounted => println!("mounted"),
        Event::HostLost => println!("host lost: whoever uses the mount waits"),
        Event::HostBack { .. } => println!("host back"),
        Event::Ended(Ok(())) => println!("ended"),
        Event::Ended(Err(e)) => println!("ended: {e}"),
    }
}

fn main() -> Result<(), Error> {
    let mut args = std::env::args_os().skip(1);
    let (Some(socket), Some(point)) = (args.next(), args.next()) else {
        return Err(Error::Setup("usage: mount SOCKET DIRECTORY".into()));
    };
    let mut settings = Settings::default();
    // Where the next host will be, if this one goes.
    settings.transport.socket_path = socket.clone().into();
    let config = MountConfig::new(&settings, point.as_ref(), MountOptions::default());
    // A sandbox would have been given this by the program that started it.
    let stream = UnixStream::connect(socket)?;
    let service = Service::with_connection(connect_over(stream, &config.guest)?, &config, on_event)?;
    eprintln!("{}", service.describe());
    std::io::stdin().read_to_end(&mut Vec::new())?;
    service.unmount()?;
    eprint!("{}", service.statistics());
    service.wait();
    Ok(())
}
