//! `uio_pci_generic`: needs no IOMMU, and gives the INTx line. BARs and config space are files in sysfs.

use super::function::{FileRegion, Function, IrqSource};
use super::sysfs::Device;
use crate::error::Error;
use std::fs::{self, File};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Opens a device that is bound to `uio_pci_generic`.
///
/// # Errors
/// [`Error::Setup`], which names the file.
pub fn open(device: &Device) -> Result<Function, Error> {
    let window = |name: &str| -> Result<FileRegion, Error> {
        let path = device.path(name);
        let file = File::options().read(true).write(true).open(&path);
        let file = file.map_err(|e| Error::Setup(format!("{}: {e}; it takes root", path.display())))?;
        let bytes = file.metadata()?.len();
        Ok(FileRegion { file: Arc::new(file), offset: 0, bytes })
    };
    let bars = (0..6).map(|i| Some(format!("resource{i}")).filter(|f| device.path(f).exists()));
    let bars = bars.map(|file| file.map(|f| window(&f)).transpose()).collect::<Result<_, _>>()?;
    let node = node(device)?;
    let file = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(&node);
    let file = file.map_err(|e| Error::Setup(format!("{}: {e}; it takes root", node.display())))?;
    Ok(Function { config: window("config")?, bars, interrupts: IrqSource::Uio(Arc::new(file)) })
}

/// Returns the device's node in /dev. Waits up to 5 s for it: it appears a moment after the driver is bound.
fn node(device: &Device) -> Result<std::path::PathBuf, Error> {
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        let names = fs::read_dir(device.path("uio")).into_iter().flatten();
        let nodes = names.filter_map(|name| Some(std::path::Path::new("/dev").join(name.ok()?.file_name())));
        if let Some(node) = nodes.into_iter().find(|node| node.exists()) {
            return Ok(node);
        }
        if Instant::now() > end {
            return Err(Error::Setup(format!(
                "{}: no uio device appears in /dev; is devtmpfs mounted?",
                device.name()
            )));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
