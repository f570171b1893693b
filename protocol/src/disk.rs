//! How a machine's disk is written in configuration: on the VMM's command line, in the agent's parameter `disks`, in a policy.
//!
//! ```text
//! name=vda,file=/vm/db.raw,format=raw[,bus=virtio|scsi][,slices=/vm/db.row][,mode=shared|mirrored][,queues=4][,cache=none][,aio=io_uring][,readonly]
//! name=vda,file=iscsi://HOST[:PORT]/TARGET/LUN,format=raw,slices=/vm/db.row[,chap=/etc/understudy/chap][,queues=4][,readonly]
//! ```
//! A *shared* disk is one file that every node sees; of a *mirrored* one each node has its own, at the same path.
//!
//! Parsing opens nothing; whether the files are there is for the node to say that runs the machine.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::iscsi;

/// Most disks of a machine.
pub const MAX_DISKS: usize = 8;
/// Most queues of a disk.
pub const MAX_QUEUES: u16 = 32;
/// Longest name: what the guest can read as the disk's id.
pub const MAX_NAME: usize = 20;

/// How the bytes of a disk are laid out in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// Byte for byte: a file or a block device.
    Raw,
    /// QEMU's copy-on-write format.
    Qcow2,
}

/// Whether a raw disk is read and written through the host's page cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskCache {
    /// Past it.
    None,
    /// Through it; a guest's flush is a flush all the same.
    Writeback,
}

/// Who waits for a raw disk's reads and writes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskAio {
    /// io_uring without the page cache, threads with it.
    #[default]
    Auto,
    /// io_uring, if the host allows it.
    IoUring,
    /// Threads.
    Threads,
}

/// How the guest sees a disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskBus {
    /// A device of its own, `virtio-blk`.
    #[default]
    Virtio,
    /// At the machine's SCSI controller, `virtio-scsi`.
    Scsi,
}

impl DiskBus {
    /// Whether it is what a disk has that says nothing.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// One disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSpec {
    /// What status, errors and the guest (as its id) call it.
    pub name: String,
    /// The base: a file or a block device, absolute, or the address of an iSCSI disk ([`crate::iscsi::Url`]).
    pub file: String,
    /// Its format. Never guessed: a guest can write any header to its disk.
    pub format: DiskFormat,
    /// How the guest sees it.
    #[serde(default, skip_serializing_if = "DiskBus::is_default")]
    pub bus: DiskBus,
    /// Directory of its slices, absolute; `None`: `FILE.row`.
    pub slices: Option<String>,
    /// Each node has its own copy of it, and of its slices.
    #[serde(default)]
    pub mirrored: bool,
    /// Queues of a device of its own; `None`: one for each vCPU.
    pub queues: Option<u16>,
    /// The host's page cache; `None`: for files, not for block devices.
    #[serde(default)]
    pub cache: Option<DiskCache>,
    /// Who waits.
    #[serde(default)]
    pub aio: DiskAio,
    /// The file with user and secret for an iSCSI target.
    #[serde(default)]
    pub chap: Option<String>,
    /// The guest may only read it. It has no slices and no owner.
    pub read_only: bool,
}

/// Why a text is no disk.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is no disk: {why}; write name=vda,file=/path|iscsi://HOST/TARGET/LUN,format=raw[,bus=scsi][,slices=/directory][,mode=mirrored][,queues=N][,cache=none|writeback][,aio=auto|io_uring|threads][,chap=/file][,readonly]"
)]
pub struct NoDisk {
    text: String,
    why: String,
}

impl FromStr for DiskSpec {
    type Err = NoDisk;

    fn from_str(text: &str) -> Result<Self, NoDisk> {
        parse(text.trim()).map_err(|why| NoDisk { text: text.to_owned(), why })
    }
}

fn parse(text: &str) -> Result<DiskSpec, String> {
    let (mut cache, mut aio, mut chap) = (None, None, None);
    let (mut name, mut file, mut format, mut slices, mut queues, mut read_only) = (None, None, None, None, None, false);
    let mut mirrored = None;
    let mut bus = None;
    for part in text.split(',') {
        let (key, value) = part.split_once('=').unwrap_or((part, ""));
        let text = || Some(value.to_owned());
        let again = match key {
            "name" => name.replace(value.to_owned()).is_some(),
            "file" => std::mem::replace(&mut file, text()).is_some(),
            "slices" => std::mem::replace(&mut slices, text()).is_some(),
            "format" => {
                let parsed = match value {
                    "raw" => DiskFormat::Raw,
                    "qcow2" => DiskFormat::Qcow2,
                    _ => return Err(format!("{value:?} is no format, there are raw and qcow2")),
                };
                format.replace(parsed).is_some()
            }
            "mode" => {
                let parsed = match value {
                    "shared" => false,
                    "mirrored" => true,
                    _ => return Err(format!("{value:?} is no mode, there are shared and mirrored")),
                };
                mirrored.replace(parsed).is_some()
            }
            "bus" => {
                let parsed = match value {
                    "virtio" => DiskBus::Virtio,
                    "scsi" => DiskBus::Scsi,
                    _ => return Err(format!("{value:?} is no bus, there are virtio and scsi")),
                };
                bus.replace(parsed).is_some()
            }
            "queues" => {
                let number = value.parse().ok().filter(|n| (1..=MAX_QUEUES).contains(n));
                let Some(number) = number else { return Err(format!("it can have 1 to {MAX_QUEUES} queues")) };
                queues.replace(number).is_some()
            }
            "chap" => std::mem::replace(&mut chap, text()).is_some(),
            "cache" => {
                let parsed = match value {
                    "none" => DiskCache::None,
                    "writeback" => DiskCache::Writeback,
                    _ => return Err(format!("{value:?} is no cache, there are none and writeback")),
                };
                cache.replace(parsed).is_some()
            }
            "aio" => {
                let parsed = match value {
                    "auto" => DiskAio::Auto,
                    "io_uring" => DiskAio::IoUring,
                    "threads" => DiskAio::Threads,
                    _ => return Err(format!("{value:?} is no aio, there are auto, io_uring and threads")),
                };
                aio.replace(parsed).is_some()
            }
            "readonly" if !part.contains('=') => std::mem::replace(&mut read_only, true),
            _ => return Err(format!("it has no property {key:?}")),
        };
        if again {
            return Err(format!("{key} is said twice"));
        }
    }
    let name = name.ok_or("it has no name")?;
    check_name(&name)?;
    let file = file.ok_or("it has no file")?;
    let format = format.ok_or("it has no format")?;
    let iscsi = file.starts_with(iscsi::SCHEME);
    if iscsi {
        file.parse::<iscsi::Url>()?;
        if format != DiskFormat::Raw || cache.is_some() || aio.is_some() {
            return Err("an iSCSI disk is raw, and neither cache nor aio can be chosen for it".into());
        }
        if slices.is_none() && !read_only {
            return Err(
                "an iSCSI disk has no place for slices: say slices=/directory, on a file system that every node sees"
                    .into(),
            );
        }
    } else if chap.is_some() {
        return Err("chap is for iSCSI disks".into());
    }
    let paths = [Some(&file).filter(|_| !iscsi), slices.as_ref(), chap.as_ref()];
    paths.into_iter().flatten().try_for_each(|path| check_path(path))?;
    let bus = bus.unwrap_or_default();
    if bus == DiskBus::Scsi && queues.is_some() {
        return Err("at a SCSI controller a disk has no queues of its own".into());
    }
    if read_only && slices.is_some() {
        return Err("what is only read has no slices".into());
    }
    let mirrored = mirrored.unwrap_or(false);
    if read_only && mirrored {
        return Err("what is only read is not mirrored: put the same file on every node".into());
    }
    if mirrored && file.starts_with("iscsi:") {
        return Err("a disk on an iSCSI target is one for all nodes: it is shared, not mirrored".into());
    }
    if format == DiskFormat::Qcow2 && (cache.is_some() || aio.is_some()) {
        return Err("cache and aio can be chosen for raw disks only".into());
    }
    let aio = aio.unwrap_or_default();
    Ok(DiskSpec { name, file, format, bus, slices, mirrored, queues, cache, aio, chap, read_only })
}

/// Whether this can be a disk's or a drive's name; the sentence says why not.
pub(crate) fn check_name(name: &str) -> Result<(), String> {
    let good = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(good) {
        return Err(format!("its name must be up to {MAX_NAME} letters, digits, - and _"));
    }
    Ok(())
}

/// The same for a path.
pub(crate) fn check_path(path: &str) -> Result<(), String> {
    if !path.starts_with('/') || path.contains([';', ',', '\n']) || path.trim_end() != path {
        return Err(format!(
            "{path:?} must be an absolute path, without commas and semicolons, and not end in a space"
        ));
    }
    Ok(())
}

impl fmt::Display for DiskSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, file, format, bus, slices, mirrored, queues, cache, aio, chap, read_only } = self;
        let format = match format {
            DiskFormat::Raw => "raw",
            DiskFormat::Qcow2 => "qcow2",
        };
        write!(f, "name={name},file={file},format={format}")?;
        if *bus == DiskBus::Scsi {
            f.write_str(",bus=scsi")?;
        }
        if let Some(slices) = slices {
            write!(f, ",slices={slices}")?;
        }
        if *mirrored {
            f.write_str(",mode=mirrored")?;
        }
        if let Some(queues) = queues {
            write!(f, ",queues={queues}")?;
        }
        if let Some(cache) = cache {
            f.write_str(match cache {
                DiskCache::None => ",cache=none",
                DiskCache::Writeback => ",cache=writeback",
            })?;
        }
        f.write_str(match aio {
            DiskAio::Auto => "",
            DiskAio::IoUring => ",aio=io_uring",
            DiskAio::Threads => ",aio=threads",
        })?;
        if let Some(chap) = chap {
            write!(f, ",chap={chap}")?;
        }
        if *read_only { f.write_str(",readonly") } else { Ok(()) }
    }
}

/// A machine's disks: one a line, or separated by semicolons.
///
/// # Errors
/// The first that is none; a name or a file that is there twice; too many.
pub fn parse_list(text: &str) -> Result<Vec<DiskSpec>, NoDisk> {
    let parts = text.split(['\n', ';']).map(str::trim).filter(|part| !part.is_empty());
    let disks = parts.map(DiskSpec::from_str).collect::<Result<Vec<_>, _>>()?;
    check_list(&disks)?;
    Ok(disks)
}

/// Whether these disks can be in one machine.
///
/// # Errors
/// A name or a file that is there twice; too many.
pub fn check_list(disks: &[DiskSpec]) -> Result<(), NoDisk> {
    for (i, disk) in disks.iter().enumerate() {
        let refuse = |why: String| Err(NoDisk { text: disk.to_string(), why });
        if i >= MAX_DISKS {
            return refuse(format!("a machine has at most {MAX_DISKS} disks"));
        }
        for other in &disks[..i] {
            if other.name == disk.name {
                return refuse("another disk has its name".into());
            }
            if other.file == disk.file && !(other.read_only && disk.read_only) {
                return refuse("another disk has its file".into());
            }
            if other.slices.is_some() && other.slices == disk.slices {
                return refuse("another disk has its slices".into());
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_read_and_written_the_same() {
        for text in [
            "name=vda,file=/vm/a.raw,format=raw",
            "name=vda,file=/vm/a.raw,format=qcow2,slices=/vm/row,queues=4",
            "name=vda,file=/vm/a.raw,format=raw,cache=none,aio=io_uring",
            "name=vda,file=/vm/a.raw,format=raw,cache=writeback,aio=threads",
            "name=vda,file=iscsi://san/iqn.2026-11.org.example:db/1,format=raw,slices=/vm/row,chap=/etc/understudy/chap",
            "name=cd,file=iscsi://san/iqn.2026-11.org.example:cd/1,format=raw,readonly",
            "name=cd,file=/vm/a.iso,format=raw,readonly",
            "name=vda,file=/vm/a.raw,format=raw,slices=/vm/row,mode=mirrored,queues=2",
            "name=sda,file=/vm/a.raw,format=raw,bus=scsi,slices=/vm/row",
        ] {
            assert_eq!(text.parse::<DiskSpec>().unwrap().to_string(), text);
        }
        let other = "readonly,format=raw,file=/x,name=a".parse::<DiskSpec>().unwrap();
        assert!(other.read_only && other.slices.is_none());
    }

    #[test]
    fn what_is_no_disk_is_told_why() {
        for (text, why) in [
            ("", "no property"),
            ("name=a,file=/x", "no format"),
            ("name=a,format=raw", "no file"),
            ("file=/x,format=raw", "no name"),
            ("name=,file=/x,format=raw", "letters, digits"),
            ("name=a b,file=/x,format=raw", "letters, digits"),
            ("name=a,file=x,format=raw", "absolute"),
            ("name=a,file=/x;y,format=raw", "semicolons"),
            ("name=a,file=/x ,format=raw", "a space"),
            ("name=a,file=/x,format=vmdk", "there are raw and qcow2"),
            ("name=a,file=/x,format=raw,queues=0", "1 to 32"),
            ("name=a,file=/x,format=raw,bus=ide", "there are virtio and scsi"),
            ("name=a,file=/x,format=raw,bus=scsi,queues=2", "no queues of its own"),
            ("name=a,file=/x,format=raw,queues=many", "1 to 32"),
            ("name=a,file=/x,format=raw,readonly=no", "no property"),
            ("name=a,file=/x,format=raw,cache=unsafe", "none and writeback"),
            ("name=a,file=/x,format=raw,aio=native", "auto, io_uring"),
            ("name=a,file=/x,format=qcow2,cache=none", "raw disks only"),
            ("name=a,file=/x,format=raw,discard=on", "no property"),
            ("name=a,file=/x,format=raw,chap=/y", "for iSCSI"),
            ("name=a,file=iscsi://san/iqn.a/1,format=raw", "slices="),
            ("name=a,file=iscsi://san/iqn.a/1,format=raw,slices=/y,chap=z", "absolute"),
            ("name=a,file=iscsi://san/iqn.a/1,format=raw,slices=/y,cache=none", "neither cache"),
            ("name=a,file=iscsi://me%x@san/iqn.a/1,format=raw,slices=/y", "chap="),
            ("name=a,name=b,file=/x,format=raw", "twice"),
            ("name=a,file=/x,format=raw,readonly,slices=/y", "no slices"),
            ("name=a,file=/x,format=raw,mode=both", "there are shared and mirrored"),
            ("name=a,file=/x,format=raw,mode=shared,mode=shared", "twice"),
            ("name=a,file=/x,format=raw,mode=mirrored,readonly", "not mirrored"),
        ] {
            let e = text.parse::<DiskSpec>().unwrap_err().to_string();
            assert!(e.contains(why), "{text}: {e}");
        }
    }

    #[test]
    fn a_list_has_lines_or_semicolons_and_nothing_twice() {
        let list = "\n name=a,file=/a,format=raw ; name=b,file=/b,format=raw\n\nname=c,file=/c,format=raw\n";
        assert_eq!(parse_list(list).unwrap().iter().map(|d| d.name.as_str()).collect::<Vec<_>>(), ["a", "b", "c"]);
        assert_eq!(parse_list("").unwrap(), []);
        let refused = |text: &str| parse_list(text).unwrap_err().to_string();
        assert!(refused("name=a,file=/a,format=raw;name=a,file=/b,format=raw").contains("its name"));
        assert!(refused("name=a,file=/a,format=raw;name=b,file=/a,format=raw,readonly").contains("its file"));
        let many: Vec<_> = (0..9).map(|i| format!("name=d{i},file=/d{i},format=raw")).collect();
        assert!(refused(&many.join(";")).contains("at most 8"));
    }
}
