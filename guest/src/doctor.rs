//! `tunnelfs-guest doctor`: checks whether this machine can mount with the given settings.

use std::io::{self, ErrorKind};
use std::os::unix::net::UnixStream;
use std::path::Path;
use tunnelfs_guest::fuse::device;
use tunnelfs_program::doctor::{parse, Report};
use tunnelfs_settings::{Channel, PciDriver, Settings};

/// Checks everything that a mount with these settings needs.
pub fn examine(settings: &Settings) -> Report {
    let mut report = Report::default();
    report.kernel((5, 4), (6, 14), "has FUSE-over-io_uring, which is faster");
    rights(&mut report);
    match device::open_device() {
        Ok(_) => report.fine("/dev/fuse: can be opened"),
        Err(e) => report.problem("/dev/fuse: cannot be opened", e),
    }
    uring(settings, &mut report);
    if settings.mount.pci.is_empty() && settings.mount.tag.is_empty() {
        socket(&settings.transport.socket_path, &mut report);
    } else {
        pci(settings, &mut report);
    }
    report.huge_pages(&settings.transport);
    slot_size(settings, &mut report);
    helper(&mut report);
    report
}

fn rights(report: &mut Report) {
    match nix::unistd::geteuid().is_root() {
        true => report.fine("this user may mount: root"),
        false => {
            report.problem("only root can mount", "run it by sudo, or in `unshare --user --map-root-user --mount`")
        }
    }
}

fn uring(settings: &Settings, report: &mut Report) {
    if device::uring_enabled() {
        return report.fine("FUSE-over-io_uring: switched on");
    }
    match settings.mount.channel {
        Channel::Uring => {
            report.problem("FUSE-over-io_uring: not to be had, and channel = uring", device::uring_hint())
        }
        Channel::Auto => report.advice("FUSE-over-io_uring: off, mounts use /dev/fuse", device::uring_hint()),
        Channel::Fuse => report.fine("channel = fuse: /dev/fuse"),
    }
    if let Some(2) = parse::<u32>("/proc/sys/kernel/io_uring_disabled") {
        report.advice("io_uring: disabled on this machine", "sysctl kernel.io_uring_disabled=0");
    }
}

fn socket(path: &Path, report: &mut Report) {
    let shown = path.display();
    match UnixStream::connect(path) {
        Ok(_) => report.fine(format!("host's socket {shown}: somebody listens")),
        Err(e) => report.problem(format!("host's socket {shown}: {e}"), socket_remedy(&e, path)),
    }
}

fn socket_remedy(e: &io::Error, path: &Path) -> String {
    match e.kind() {
        ErrorKind::NotFound => format!("start a host: tunnelfs-host --socket-path {} --shared-dir DIR", path.display()),
        ErrorKind::ConnectionRefused => "the host that made it has gone: start one again".into(),
        ErrorKind::PermissionDenied => "only the host's user and root may connect: run as one of them".into(),
        _ => "name the socket that a host listens on with --socket-path".into(),
    }
}

fn pci(settings: &Settings, report: &mut Report) {
    let iommu = std::fs::read_dir("/sys/kernel/iommu_groups").is_ok_and(|mut groups| groups.next().is_some());
    let (driver, module) = match settings.mount.pci_driver {
        PciDriver::Vfio => ("vfio-pci", "vfio_pci"),
        PciDriver::Auto if iommu => ("vfio-pci", "vfio_pci"),
        PciDriver::Uio | PciDriver::Auto => ("uio_pci_generic", "uio_pci_generic"),
    };
    if settings.mount.pci_driver == PciDriver::Vfio && !iommu {
        report.problem("vfio: this VM has no IOMMU", "give the VM one (-device virtio-iommu-pci), or --pci-driver uio");
    }
    match Path::new("/sys/bus/pci/drivers").join(driver).exists() || Path::new("/sys/module").join(module).exists() {
        true => report.fine(format!("driver {driver}: loaded")),
        false => report.advice(format!("driver {driver}: not loaded"), format!("modprobe {driver}")),
    }
    let address = &settings.mount.pci;
    if !address.is_empty() && !Path::new("/sys/bus/pci/devices").join(address).exists() {
        report.problem(format!("no PCI device {address}"), "lspci -D -d 1af4:105a lists those of virtio-fs");
    }
}

/// Checks `fs.fuse.max_pages_limit`, which must be raised for slots of more than 1 MiB.
fn slot_size(settings: &Settings, report: &mut Report) {
    let pages = settings.transport.slot_size / 4096;
    let most = parse::<u32>("/proc/sys/fs/fuse/max_pages_limit").unwrap_or(256);
    if pages > most {
        report.advice(
            format!("slots of {} KiB: the kernel sends {} KiB at the most", pages * 4, most * 4),
            format!("sysctl fs.fuse.max_pages_limit={pages} (kernel 6.13 or newer)"),
        );
    }
}

fn helper(report: &mut Report) {
    match ["/sbin/mount.tunnelfs", "/usr/sbin/mount.tunnelfs"].iter().any(|path| Path::new(path).exists()) {
        true => report.fine("mount -t tunnelfs: /sbin/mount.tunnelfs is there"),
        false => report.advice("mount -t tunnelfs and fstab: no helper", "make install links /sbin/mount.tunnelfs"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tunnelfs_program::doctor::Grade;

    fn about(report: &Report, word: &str) -> Vec<Grade> {
        report.0.iter().filter(|finding| finding.what.contains(word)).map(|finding| finding.grade).collect()
    }

    #[test]
    fn what_is_missing_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let mut settings = Settings::default();
        settings.transport.socket_path = dir.path().join("socket");
        assert_eq!(about(&examine(&settings), "host's socket"), [Grade::Problem]);
        let _listener = std::os::unix::net::UnixListener::bind(&settings.transport.socket_path).unwrap();
        assert_eq!(about(&examine(&settings), "host's socket"), [Grade::Fine]);
        settings.mount.pci = "ffff:ff:1f.7".into();
        settings.transport.slot_size = 16 << 20;
        let report = examine(&settings);
        assert!(about(&report, "host's socket").is_empty());
        assert_eq!(about(&report, "no PCI device"), [Grade::Problem]);
        assert_eq!(about(&report, "slots of 16384 KiB"), [Grade::Advice]);
        assert!(report.0.iter().all(|found| found.remedy.is_empty() == (found.grade == Grade::Fine)), "{report:?}");
    }
}
