//! How a machine's CD-ROM drive is written in configuration: on the VMM's command line, in the agent's parameter `cdroms`, in a policy.
//!
//! ```text
//! name=cd0[,file=/srv/iso/install.iso][,bus=scsi]
//! ```
//! The file is what lies in the drive when the machine is switched on; what lies in it later is part of the machine's state.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::disk::{DiskSpec, check_name, check_path};

/// Most drives of a machine.
pub const MAX_CDROMS: usize = 4;

/// One drive, at the machine's SCSI controller.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CdromSpec {
    /// What status and errors call it, and the guest, as its serial number.
    pub name: String,
    /// What lies in it when the machine is switched on: an ISO image, absolute. The same on every node.
    pub file: Option<String>,
}

/// Why a text is no drive.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no CD-ROM drive: {why}; write name=cd0[,file=/path/image.iso][,bus=scsi]")]
pub struct NoCdrom {
    text: String,
    why: String,
}

impl FromStr for CdromSpec {
    type Err = NoCdrom;

    fn from_str(text: &str) -> Result<Self, NoCdrom> {
        parse(text.trim()).map_err(|why| NoCdrom { text: text.to_owned(), why })
    }
}

fn parse(text: &str) -> Result<CdromSpec, String> {
    let (mut name, mut file, mut bus) = (None, None, None);
    for part in text.split(',') {
        let (key, value) = part.split_once('=').unwrap_or((part, ""));
        let property = match key {
            "name" => &mut name,
            "file" => &mut file,
            "bus" if value == "scsi" => &mut bus,
            "bus" => return Err(format!("{value:?} is no bus for it, there is scsi")),
            _ => return Err(format!("it has no property {key:?}")),
        };
        if property.replace(value.to_owned()).is_some() {
            return Err(format!("{key} is said twice"));
        }
    }
    let name = name.ok_or("it has no name")?;
    check_name(&name)?;
    file.as_deref().map_or(Ok(()), check_path)?;
    Ok(CdromSpec { name, file })
}

impl fmt::Display for CdromSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, file } = self;
        write!(f, "name={name}")?;
        file.as_ref().map_or(Ok(()), |file| write!(f, ",file={file}"))
    }
}

/// A machine's drives: one a line, or separated by semicolons.
///
/// # Errors
/// The first that is none; a name that is there twice; too many.
pub fn parse_list(text: &str) -> Result<Vec<CdromSpec>, NoCdrom> {
    let parts = text.split(['\n', ';']).map(str::trim).filter(|part| !part.is_empty());
    let drives = parts.map(CdromSpec::from_str).collect::<Result<Vec<_>, _>>()?;
    check_list(&drives, &[])?;
    Ok(drives)
}

/// Whether these drives can be in one machine with these disks.
///
/// # Errors
/// A name that is there twice; too many.
pub fn check_list(drives: &[CdromSpec], disks: &[DiskSpec]) -> Result<(), NoCdrom> {
    for (i, drive) in drives.iter().enumerate() {
        let refuse = |why: String| Err(NoCdrom { text: drive.to_string(), why });
        if i >= MAX_CDROMS {
            return refuse(format!("a machine has at most {MAX_CDROMS} drives"));
        }
        let taken = drives[..i].iter().map(|other| &other.name).chain(disks.iter().map(|disk| &disk.name));
        if taken.into_iter().any(|name| *name == drive.name) {
            return refuse("another disk or drive has its name".into());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drive_is_read_and_written_the_same() {
        for text in ["name=cd0", "name=cd0,file=/srv/a.iso"] {
            assert_eq!(text.parse::<CdromSpec>().unwrap().to_string(), text);
        }
        assert_eq!("bus=scsi,name=cd0".parse::<CdromSpec>().unwrap().to_string(), "name=cd0");
    }

    #[test]
    fn what_is_no_drive_is_told_why() {
        for (text, why) in [
            ("", "no property"),
            ("file=/a.iso", "no name"),
            ("name=a b", "letters, digits"),
            ("name=a,file=a.iso", "absolute"),
            ("name=a,bus=ide", "there is scsi"),
            ("name=a,name=a", "twice"),
            ("name=a,format=raw", "no property"),
        ] {
            let e = text.parse::<CdromSpec>().unwrap_err().to_string();
            assert!(e.contains(why), "{text}: {e}");
        }
        let refused = |text: &str| parse_list(text).unwrap_err().to_string();
        assert!(refused("name=a;name=a").contains("its name"));
        assert!(refused("name=a;name=b;name=c;name=d;name=e").contains("at most 4"));
        let disk: DiskSpec = "name=a,file=/a,format=raw".parse().unwrap();
        let drives = parse_list("name=a").unwrap();
        assert!(check_list(&drives, &[disk]).unwrap_err().to_string().contains("its name"));
    }
}
