//! How a machine's disk is written in configuration: on the VMM's command line, in the agent's parameter `disks`, in a policy.
//!
//! ```text
//! name=vda,file=/vm/db.raw,format=raw[,bus=virtio|scsi][,slices=/vm/db.row][,queues=4][,readonly]
//! ```
//! Parsing opens nothing; whether the files are there is for the node to say that runs the machine.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

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
    /// The base: a file or a block device, absolute.
    pub file: String,
    /// Its format. Never guessed: a guest can write any header to its disk.
    pub format: DiskFormat,
    /// How the guest sees it.
    #[serde(default, skip_serializing_if = "DiskBus::is_default")]
    pub bus: DiskBus,
    /// Directory of its slices, absolute; `None`: `FILE.row`.
    pub slices: Option<String>,
    /// Queues of a device of its own; `None`: one for each vCPU.
    pub queues: Option<u16>,
    /// The guest may only read it. It has no slices and no owner.
    pub read_only: bool,
}

/// Why a text is no disk.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is no disk: {why}; write name=vda,file=/path,format=raw[,bus=scsi][,slices=/directory][,queues=N][,readonly]"
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
    let (mut name, mut file, mut format, mut slices, mut queues, mut read_only) = (None, None, None, None, None, false);
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
    [Some(&file), slices.as_ref()].into_iter().flatten().try_for_each(|path| check_path(path))?;
    let bus = bus.unwrap_or_default();
    if bus == DiskBus::Scsi && queues.is_some() {
        return Err("at a SCSI controller a disk has no queues of its own".into());
    }
    if read_only && slices.is_some() {
        return Err("what is only read has no slices".into());
    }
    Ok(DiskSpec { name, file, format, bus, slices, queues, read_only })
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
    if !path.starts_with('/') || path.contains([';', ',']) {
        return Err(format!("{path:?} must be an absolute path, without commas and semicolons"));
    }
    Ok(())
}

impl fmt::Display for DiskSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, file, format, bus, slices, queues, read_only } = self;
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
        if let Some(queues) = queues {
            write!(f, ",queues={queues}")?;
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
            "name=cd,file=/vm/a.iso,format=raw,readonly",
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
            ("name=a,file=/x,format=vmdk", "there are raw and qcow2"),
            ("name=a,file=/x,format=raw,queues=0", "1 to 32"),
            ("name=a,file=/x,format=raw,bus=ide", "there are virtio and scsi"),
            ("name=a,file=/x,format=raw,bus=scsi,queues=2", "no queues of its own"),
            ("name=a,file=/x,format=raw,queues=many", "1 to 32"),
            ("name=a,file=/x,format=raw,readonly=no", "no property"),
            ("name=a,file=/x,format=raw,cache=none", "no property"),
            ("name=a,name=b,file=/x,format=raw", "twice"),
            ("name=a,file=/x,format=raw,readonly,slices=/y", "no slices"),
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
