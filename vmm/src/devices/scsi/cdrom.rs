//! What a CD-ROM drive does (MMC-6): one finished session with one data track, or nothing in the tray.

use super::cdb::{Cdb, op};
use super::{Attention, CD_BLOCK, Class, Drive, MediaEvent, Medium, Reply, Sense, Unit, Work, limited, span};
use crate::devices::virtio::requests::REQUEST_BYTES;

/// More blocks than these (80 minutes) are a DVD.
const CD_BLOCKS: u64 = 80 * 60 * 75;
/// Profiles (MMC-6, table 93).
const PROFILE_CD: u16 = 0x08;
const PROFILE_DVD: u16 = 0x10;
/// Frames before the first block.
const PREGAP: u64 = 150;
/// Lead-out's track number.
const LEAD_OUT: u8 = 0xaa;
/// 50 times, kB/s.
const SPEED: u16 = 8820;

/// Why a medium could not be taken out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// The initiator has locked it, and was asked to let it go.
    Locked,
    /// It is no drive.
    NoDrive,
}

impl Drive {
    /// What can be read.
    pub(super) fn present(&self) -> Option<&Medium> {
        self.medium.as_ref().filter(|_| !self.open)
    }

    pub(super) fn ready(&self) -> Result<u64, Sense> {
        match (self.present(), self.open) {
            (Some(medium), _) => Ok(medium.bytes / CD_BLOCK),
            (None, true) => Err(Sense::TRAY_OPEN),
            (None, false) => Err(Sense::NO_MEDIUM),
        }
    }

    /// Mode page 2A (MMC-3, 6.3.10; still what drivers look at).
    pub(super) fn capabilities(&self) -> Vec<u8> {
        let mut page = vec![0; 18];
        // Reads CD-R, CD-RW, DVD-ROM; mode 2, several sessions.
        (page[0], page[2]) = (0x0b, 0x70);
        // A tray; ejects; locks; is it locked?
        page[4] = 0x29 | u8::from(self.locked) << 1;
        page[6..8].copy_from_slice(&SPEED.to_be_bytes());
        page[12..14].copy_from_slice(&SPEED.to_be_bytes());
        page
    }

    fn profile(&self) -> u16 {
        match self.ready() {
            Ok(blocks) if blocks > CD_BLOCKS => PROFILE_DVD,
            Ok(_) => PROFILE_CD,
            Err(_) => 0,
        }
    }
}

impl Unit {
    /// What lies in the drive, also while the tray is open.
    #[must_use]
    pub fn medium(&self) -> Option<&Medium> {
        match &self.class {
            Class::Cdrom(drive) => drive.medium.as_ref(),
            Class::Disk { .. } => None,
        }
    }

    /// Whether it is a drive, and the initiator has locked it; whether its tray is open.
    #[must_use]
    pub fn tray(&self) -> Option<(bool, bool)> {
        match &self.class {
            Class::Cdrom(drive) => Some((drive.locked, drive.open)),
            Class::Disk { .. } => None,
        }
    }

    /// Somebody at the drive takes the medium out, or puts one in, or changes it. By force also where the initiator has locked it.
    ///
    /// # Errors
    /// The initiator has locked it; it is asked to release it (an *eject request*).
    pub fn change_medium(&mut self, to: Option<Medium>, force: bool) -> Result<(), Refused> {
        let Class::Cdrom(drive) = &mut self.class else { return Err(Refused::NoDrive) };
        if drive.locked && drive.medium.is_some() && !force {
            drive.event = MediaEvent::EjectRequest;
            return Err(Refused::Locked);
        }
        drive.event = match (&to, &drive.medium) {
            (Some(_), _) => MediaEvent::New,
            (None, Some(_)) => MediaEvent::Removal,
            (None, None) => drive.event,
        };
        let inserted = to.is_some();
        (drive.medium, drive.open) = (to, false);
        if inserted {
            self.attend(Attention::Medium);
        } else {
            self.attentions &= !(Attention::Medium as u8);
        }
        Ok(())
    }

    /// What lies in the drive when the machine is switched on.
    pub fn load_medium(&mut self, to: Option<Medium>) {
        if let Class::Cdrom(drive) = &mut self.class {
            drive.medium = to;
        }
    }

    pub(super) fn cdrom_command(&mut self, cdb: Cdb) -> Result<Reply, Sense> {
        let Class::Cdrom(drive) = &mut self.class else { return Err(Sense::INVALID_OPCODE) };
        match cdb.opcode() {
            op::READ_10 | op::READ_12 => {
                let blocks = drive.ready()?;
                let (first, number) = cdb.run();
                let (at, len) = span(first, number, blocks, CD_BLOCK)?;
                if len > REQUEST_BYTES {
                    return Err(Sense::INVALID_FIELD);
                }
                Ok(if len == 0 { Reply::Data(Vec::new()) } else { Reply::Do(Work::Read { at, len }) })
            }
            op::READ_CAPACITY_10 => {
                // What fits a drive has at most 2^32 - 1 blocks.
                let last = drive.ready()?.saturating_sub(1) as u32;
                Ok(Reply::Data([last.to_be_bytes(), (CD_BLOCK as u32).to_be_bytes()].concat()))
            }
            op::READ_TOC => read_toc(cdb, drive.ready()?),
            op::READ_DISC_INFORMATION => {
                drive.ready()?;
                if cdb.byte(1) & 7 != 0 {
                    return Err(Sense::INVALID_FIELD);
                }
                // Finished, one session, one track, for any use.
                let mut data = vec![0; 34];
                data[..8].copy_from_slice(&[0, 32, 0x0e, 1, 1, 1, 1, 0x20]);
                limited(data, cdb.number(7, 2))
            }
            op::GET_CONFIGURATION => configuration(cdb, drive),
            op::GET_EVENT_STATUS => event_status(cdb, drive),
            op::MECHANISM_STATUS => limited(vec![0, u8::from(drive.open) << 4, 0, 0, 0, 1, 0, 0], cdb.number(8, 2)),
            op::PREVENT_ALLOW => {
                drive.locked = match cdb.byte(4) & 3 {
                    0 => false,
                    1 => true,
                    _ => return Err(Sense::INVALID_FIELD),
                };
                Ok(Reply::Data(Vec::new()))
            }
            op::START_STOP_UNIT => {
                let (power, eject, start) = (cdb.byte(4) >> 4, cdb.bit(4, 2), cdb.bit(4, 1));
                if power != 0 || !eject {
                    // Nothing turns.
                    return Ok(Reply::Data(Vec::new()));
                }
                if !start && drive.locked {
                    return Err(Sense::REMOVAL_PREVENTED);
                }
                let was = std::mem::replace(&mut drive.open, !start);
                if drive.medium.is_some() && was == start {
                    drive.event = if start { MediaEvent::New } else { MediaEvent::Removal };
                    if start {
                        self.attend(Attention::Medium);
                    }
                }
                Ok(Reply::Data(Vec::new()))
            }
            _ => Err(Sense::INVALID_OPCODE),
        }
    }
}

/// A block's address: a number, or minute, second and frame.
fn address(block: u64, msf: bool) -> [u8; 4] {
    if msf {
        let frames = block + PREGAP;
        let minutes = u8::try_from(frames / 75 / 60).unwrap_or(u8::MAX);
        [0, minutes, (frames / 75 % 60) as u8, (frames % 75) as u8]
    } else {
        (block as u32).to_be_bytes()
    }
}

/// MMC-6, 6.25.
fn read_toc(cdb: Cdb, blocks: u64) -> Result<Reply, Sense> {
    let (msf, track) = (cdb.bit(1, 2), cdb.byte(6));
    let mut data = match cdb.byte(2) & 0x0f {
        0 if track > 1 && track != LEAD_OUT => return Err(Sense::INVALID_FIELD),
        // The track table; ADR 1, a data track.
        0 => {
            let mut table = vec![0, 0, 1, 1];
            if track <= 1 {
                table.extend([0, 0x14, 1, 0]);
                table.extend(address(0, msf));
            }
            table.extend([0, 0x14, LEAD_OUT, 0]);
            table.extend(address(blocks, msf));
            table
        }
        // The sessions: one.
        1 => {
            let mut table = vec![0, 0, 1, 1, 0, 0x14, 1, 0];
            table.extend(address(0, msf));
            table
        }
        _ => return Err(Sense::INVALID_FIELD),
    };
    data[1] = (data.len() - 2) as u8;
    limited(data, cdb.number(7, 2))
}

/// MMC-6, 6.6.
fn configuration(cdb: Cdb, drive: &Drive) -> Result<Reply, Sense> {
    let (which, first) = (cdb.byte(1) & 3, cdb.number(2, 2) as u16);
    let profile = drive.profile();
    let current = |profile_: u16| u8::from(profile == profile_);
    let profiles = [PROFILE_DVD, PROFILE_CD].map(|p| [(p >> 8) as u8, p as u8, current(p), 0]).concat();
    let random = [&(CD_BLOCK as u32).to_be_bytes()[..], &[0, 16, 0, 0]].concat();
    // Number; persistent and current; content.
    let features: [(u16, u8, Vec<u8>); 4] = [
        (0x0000, 0x03, profiles),
        (0x0001, 0x0b, vec![0, 0, 0, 1, 1, 0, 0, 0]),
        (0x0003, 0x03, vec![0x29, 0, 0, 0]),
        (0x0010, u8::from(profile != 0), random),
    ];
    let mut data = vec![0, 0, 0, 0, 0, 0, (profile >> 8) as u8, profile as u8];
    for (number, flags, body) in features {
        let wanted = match which {
            0 => number >= first,
            1 => number >= first && flags & 1 != 0,
            2 => number == first,
            _ => return Err(Sense::INVALID_FIELD),
        };
        if wanted {
            data.extend([(number >> 8) as u8, number as u8, flags, body.len() as u8]);
            data.extend(body);
        }
    }
    let len = (data.len() - 4) as u32;
    data[..4].copy_from_slice(&len.to_be_bytes());
    limited(data, cdb.number(7, 2))
}

/// MMC-6, 6.7.
fn event_status(cdb: Cdb, drive: &mut Drive) -> Result<Reply, Sense> {
    const MEDIA: u8 = 1 << 4;
    if !cdb.bit(1, 1) {
        // Nothing is told without being asked.
        return Err(Sense::INVALID_FIELD);
    }
    if cdb.byte(4) & MEDIA == 0 {
        return limited(vec![0, 2, 0x80, MEDIA], cdb.number(7, 2));
    }
    let event = match std::mem::replace(&mut drive.event, MediaEvent::None) {
        MediaEvent::None => 0,
        MediaEvent::EjectRequest => 1,
        MediaEvent::New => 2,
        MediaEvent::Removal => 3,
    };
    let status = u8::from(drive.open) | u8::from(drive.medium.is_some() && !drive.open) << 1;
    limited(vec![0, 6, 4, MEDIA, event, status, 0, 0], cdb.number(7, 2))
}
