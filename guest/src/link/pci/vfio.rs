//! `vfio-pci`: needs an IOMMU in the guest, gives MSI-X vectors as eventfds, and works under kernel lockdown. The
//! device itself bypasses the IOMMU (it has no `iommu_platform`), so nothing is mapped there.
//!
//! Source: linux/vfio.h and the kernel's Documentation/driver-api/vfio.rst.

use super::function::{FileRegion, Function, IrqSource};
use super::msix::MsixVectors;
use super::sysfs::Device;
use crate::error::Error;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;
use vfio_bindings::bindings::vfio::*;

mod ioctl {
    use super::vfio_region_info;
    use nix::request_code_none;
    // All of them are `_IO(VFIO_TYPE, VFIO_BASE + n)`.
    nix::ioctl_write_ptr_bad!(group_set_container, request_code_none!(b';', 104), i32);
    nix::ioctl_write_int_bad!(set_iommu, request_code_none!(b';', 102));
    nix::ioctl_write_ptr_bad!(group_get_device_fd, request_code_none!(b';', 106), libc::c_char);
    nix::ioctl_readwrite_bad!(device_get_region_info, request_code_none!(b';', 108), vfio_region_info);
}

/// Opens a device that is bound to `vfio-pci`.
///
/// # Errors
/// [`Error::Setup`] if vfio refuses the device.
pub fn open(device: &Device) -> Result<Function, Error> {
    let told = |e: io::Error| Error::Setup(format!("{}: vfio: {e}", device.name()));
    let (file, keep) = open_device(device).map_err(told)?;
    let file = Arc::new(file);
    let window = |index: u32| {
        let mut info = vfio_region_info { argsz: size_of::<vfio_region_info>() as u32, index, ..Default::default() };
        // SAFETY: `argsz` is the structure's size.
        unsafe { ioctl::device_get_region_info(file.as_raw_fd(), &mut info) }?;
        Ok(FileRegion { file: file.clone(), offset: info.offset, bytes: info.size })
    };
    let config = window(VFIO_PCI_CONFIG_REGION_INDEX).map_err(told)?;
    let bars = (VFIO_PCI_BAR0_REGION_INDEX..=VFIO_PCI_BAR5_REGION_INDEX)
        .map(|i| window(i).map(|w| Some(w).filter(|w| w.bytes > 0)));
    let bars = bars.collect::<io::Result<_>>().map_err(told)?;
    Ok(Function { config, bars, interrupts: IrqSource::Vfio(MsixVectors::new(file, keep)) })
}

/// Opens the device. Also returns its container and group, which must stay open as long as it.
fn open_device(device: &Device) -> io::Result<(File, [File; 2])> {
    let group = std::fs::read_link(device.path("iommu_group"))?;
    let group = std::path::Path::new("/dev/vfio").join(group.file_name().unwrap_or_default());
    let open = |path: &std::path::Path| {
        let file = File::options().read(true).write(true).open(path);
        file.map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))
    };
    let (container, group) = (open("/dev/vfio/vfio".as_ref())?, open(&group)?);
    let name = CString::new(device.name())?;
    // SAFETY: the kernel reads one descriptor's number, an integer and a string that ends with a zero; it
    // answers with a new descriptor.
    unsafe {
        ioctl::group_set_container(group.as_raw_fd(), &container.as_raw_fd())?;
        ioctl::set_iommu(container.as_raw_fd(), VFIO_TYPE1v2_IOMMU as i32)?;
        let fd = ioctl::group_get_device_fd(group.as_raw_fd(), name.as_ptr())?;
        Ok((File::from_raw_fd(fd), [container, group]))
    }
}
