//! A host tells how it is: to `tunnelfs-host status` and `top` by sockets in the abstract namespace, which are named after
//! its own socket's file, and to Prometheus. All are made before the sandbox, which has no network.

use crate::figures::Figures;
use std::io;
use std::net::TcpListener;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use tunnelfs_program::control::{self, Answering, What};
use tunnelfs_program::metrics;
use tunnelfs_settings::Settings;

/// The sockets.
#[derive(Debug)]
pub struct Asked {
    scrapers: Option<TcpListener>,
    others: Vec<(Answering, What)>,
    about: String,
}

fn name(socket: &Path, what: What) -> io::Result<String> {
    let file = std::fs::metadata(socket).map_err(|e| of(socket, &e))?;
    Ok(format!("tunnelfs-host/{:x}:{:x}/{what:?}", file.dev(), file.ino()))
}

/// An error about this socket.
fn of(socket: &Path, e: &io::Error) -> io::Error {
    io::Error::new(e.kind(), format!("{}: {e}", socket.display()))
}

/// What the host behind this socket tells of itself.
///
/// # Errors
/// There is no such socket, or nobody answers.
pub fn ask(socket: &Path, what: What) -> io::Result<String> {
    control::ask(&name(socket, what)?).map_err(|e| of(socket, &e))
}

impl Asked {
    /// Listens, for the host whose socket's file is there.
    ///
    /// # Errors
    /// `host.metrics` cannot be had.
    pub(crate) fn new(settings: &Settings) -> io::Result<Self> {
        let (socket, address) = (&settings.transport.socket_path, &settings.host.metrics);
        let scrapers = (!address.is_empty()).then(|| metrics::listen(address)).transpose()?;
        let listen = |what| Ok((Answering::new(&name(socket, what)?)?, what));
        let others = [What::Status, What::Metrics].map(listen).into_iter().collect::<io::Result<_>>();
        let lost = |e: &io::Error| tracing::warn!("`tunnelfs-host status` will not answer: {e}");
        let others = others.inspect_err(lost).unwrap_or_default();
        let (kind, host) = (settings.transport.kind, &settings.host);
        let about = format!("sharing {}: {kind:?} transport, cache {:?}", host.shared_dir.display(), host.cache);
        Ok(Asked { scrapers, others, about })
    }

    /// Answers, on a thread of its own.
    pub(crate) fn serve(self, figures: Figures) -> io::Result<()> {
        let answers = self.others.into_iter().map(|(socket, what)| {
            let (figures, about) = (figures.clone(), self.about.clone());
            let text: Box<dyn Fn() -> String + Send> = match what {
                What::Status => Box::new(move || format!("{about}\n{}", figures.status())),
                What::Metrics => Box::new(move || figures.metrics()),
            };
            (socket, text)
        });
        metrics::serve(self.scrapers, answers.collect(), move || figures.metrics())
    }
}
