//! Finds the virtio-fs device, takes it from the kernel's driver, and gives it back.

use super::function::capabilities;
use crate::config::DeviceId;
use crate::error::Error;
use nix::sys::uio::{pread, pwrite};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

const DEVICES: &str = "/sys/bus/pci/devices";
const DRIVERS: &str = "/sys/bus/pci/drivers";
/// Vendor and device number of virtio-fs (virtio 1.2, 4.1.2.1: 0x1040 and the device type, 26).
const VIRTIO: &str = "0x1af4";
const VIRTIO_FS: &str = "0x105a";
/// Bytes of the tag in the device's configuration (`struct virtio_fs_config`).
const TAG_BYTES: usize = 36;

/// A virtio-fs device of this machine.
#[derive(Clone, Debug)]
pub struct Device(PathBuf);

/// Finds the device.
///
/// # Errors
/// [`Error::Setup`] if there is no such device; lists the virtio-fs devices of this machine.
pub fn find(which: &DeviceId) -> Result<Device, Error> {
    let all = all().map_err(|e| Error::Setup(format!("{DEVICES}: {e}; is this a VM with PCI, and sysfs mounted?")))?;
    let wanted = |d: &&Device| match which {
        DeviceId::Address(address) => d.name() == *address || d.name().strip_prefix("0000:") == Some(address),
        DeviceId::Tag(tag) => d.tag().is_ok_and(|t| t == *tag),
    };
    all.iter().find(wanted).cloned().ok_or_else(|| {
        let what = match which {
            DeviceId::Address(address) => format!("no virtio-fs device at {address}"),
            DeviceId::Tag(tag) => format!("no virtio-fs device with the tag `{tag}`"),
        };
        let tag = |d: &Device| d.tag().unwrap_or_else(|e| format!("tag unknown: {e}; give its address"));
        let there: Vec<_> = all.iter().map(|d| format!("{} ({})", d.name(), tag(d))).collect();
        let there = if there.is_empty() { "this machine has none".into() } else { there.join(", ") };
        Error::Setup(format!("{what}; there: {there}"))
    })
}

fn all() -> std::io::Result<Vec<Device>> {
    let is =
        |path: &Path, file: &str, value: &str| fs::read_to_string(path.join(file)).is_ok_and(|t| t.trim() == value);
    let paths = fs::read_dir(DEVICES)?.filter_map(|entry| Some(entry.ok()?.path()));
    let ours = paths.filter(|p| is(p, "vendor", VIRTIO) && is(p, "device", VIRTIO_FS));
    Ok(ours.map(Device).collect())
}

impl Device {
    /// Returns its PCI address.
    pub fn name(&self) -> String {
        self.0.file_name().unwrap_or_default().to_string_lossy().into()
    }

    /// Returns the path of one of its files or folders in sysfs.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Returns `true` if the device is in an IOMMU group, as vfio-pci requires; `false` if not.
    pub fn has_iommu(&self) -> bool {
        self.path("iommu_group").exists()
    }

    /// Returns the driver that it is bound to, if any.
    fn driver(&self) -> Option<String> {
        let link = fs::read_link(self.path("driver")).ok()?;
        Some(link.file_name()?.to_string_lossy().into())
    }

    /// Reads the tag. It is in a BAR, which a driver may be using. So this reads it through the window in config space
    /// (`VIRTIO_PCI_CAP_PCI_CFG`), which drivers do not use.
    fn tag(&self) -> std::io::Result<String> {
        let config = File::options().read(true).write(true).open(self.path("config"))?;
        let missing = || std::io::Error::other("not a modern virtio device");
        let found = capabilities(&|at, bytes| pread(&config, bytes, at).map(drop).map_err(Into::into))?;
        let of = |kind| found.iter().find(|c| c.kind == kind).ok_or_else(missing);
        let (window, fields) = (of(5)?, of(4)?);
        let mut tag = [0; TAG_BYTES];
        pwrite(&config, &[fields.bar], window.at + 4)?;
        pwrite(&config, &4u32.to_le_bytes(), window.at + 12)?;
        for (i, word) in tag.chunks_exact_mut(4).enumerate() {
            pwrite(&config, &(fields.offset + 4 * i as u32).to_le_bytes(), window.at + 8)?;
            pread(&config, word, window.at + 16)?;
        }
        let end = tag.iter().position(|&b| b == 0).unwrap_or(TAG_BYTES);
        Ok(String::from_utf8_lossy(&tag[..end]).into())
    }

    /// Binds the device to `driver`, until the claim is dropped.
    ///
    /// # Errors
    /// [`Error::Setup`], which says what to do.
    pub fn claim(&self, driver: &'static str) -> Result<Claim, Error> {
        let told = |what: &str, e: std::io::Error| {
            let hint = match driver {
                "vfio-pci" => {
                    "it needs an IOMMU in the guest (QEMU: -device intel-iommu,intremap=on) and `modprobe vfio-pci`"
                }
                _ => "it needs root and `modprobe uio_pci_generic`",
            };
            Error::Setup(format!("{}: cannot {what} for {driver}: {e}; {hint}", self.name()))
        };
        if let Ok(tag) = self.tag() {
            let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
            if mounts.lines().any(|line| line.starts_with(&format!("{tag} ")) && line.contains(" virtiofs ")) {
                return Err(Error::Setup(format!("`{tag}` is mounted by the kernel's virtiofs: unmount it first")));
            }
        }
        if !Path::new(DRIVERS).join(driver).exists() {
            // vfio-pci needs the second module for the IOMMU, and not every system loads it automatically.
            for module in [driver, "vfio_iommu_type1"].into_iter().take(if driver == "vfio-pci" { 2 } else { 1 }) {
                let _ = std::process::Command::new("modprobe").arg(module).status();
            }
        }
        // A guest that was killed has left the device at its own driver: give it back to virtio-pci later.
        let before = self.driver().map(|d| match d.as_str() {
            "uio_pci_generic" | "vfio-pci" => "virtio-pci".into(),
            _ => d,
        });
        let claim = Claim { device: self.clone(), driver, before };
        self.bind(driver).map_err(|e| told("bind the device", e))?;
        if self.driver().as_deref() != Some(driver) {
            return Err(told("bind the device", std::io::Error::other("the driver does not take it")));
        }
        Ok(claim)
    }

    fn bind(&self, driver: &str) -> std::io::Result<()> {
        if self.driver().as_deref() == Some(driver) {
            return Ok(());
        }
        if self.driver().is_some() {
            fs::write(self.path("driver/unbind"), self.name())?;
        }
        fs::write(self.path("driver_override"), driver)?;
        fs::write("/sys/bus/pci/drivers_probe", self.name())
    }
}

/// A claimed device. Dropping this gives it back to its former driver.
pub struct Claim {
    device: Device,
    driver: &'static str,
    before: Option<String>,
}

impl Claim {
    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Returns the driver that it is bound to now.
    pub fn driver(&self) -> &'static str {
        self.driver
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let back = match &self.before {
            Some(before) => self.device.bind(before),
            None => fs::write(self.device.path("driver/unbind"), self.device.name()),
        };
        if let Err(e) = back {
            tracing::warn!("{}: cannot give it back: {e}", self.device.name());
        }
        // An empty line removes the override.
        let _ = fs::write(self.device.path("driver_override"), "\n");
    }
}
