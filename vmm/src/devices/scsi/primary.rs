//! What every unit answers (SPC-4): who it is, what it is like, what it can do.

use super::cdb::{Cdb, Entry, op};
use super::{COMMANDS, Class, DISK_BLOCK, Reply, Sense, UNMAP_BLOCKS, UNMAP_RANGES, Unit, WRITE_SAME_BLOCKS, limited};
use crate::devices::virtio::requests::REQUEST_BYTES;

/// T10 vendor identification. (Not registered: so is every software target's.)
const VENDOR: &[u8; 8] = b"UNDRSTDY";
const REVISION: &[u8; 4] = b"0001";
/// What storage works with: 4 KiB.
pub(super) const PHYSICAL_EXPONENT: u8 = 3;

/// Peripheral qualifier and type of a unit that is not there.
const NOBODY: u8 = 0x7f;

impl Unit {
    /// `None`: it is not for here.
    pub(super) fn primary(&mut self, cdb: Cdb) -> Option<Result<Reply, Sense>> {
        Some(match cdb.opcode() {
            op::TEST_UNIT_READY => self.ready().map(|()| Reply::Data(Vec::new())),
            op::REQUEST_SENSE => {
                let sense = self.take_attention().unwrap_or(Sense::NONE);
                let bytes = if cdb.bit(1, 1) { sense.descriptor_bytes().to_vec() } else { sense.bytes().to_vec() };
                limited(bytes, cdb.number(4, 1))
            }
            op::INQUIRY => self.inquiry(cdb),
            op::MODE_SENSE_6 => self.mode_sense(cdb, 4),
            op::MODE_SENSE_10 => self.mode_sense(cdb, 8),
            op::REPORT_LUNS => report_luns(cdb),
            op::MAINTENANCE_IN => self.report_opcodes(cdb),
            _ => return None,
        })
    }

    fn ready(&self) -> Result<(), Sense> {
        match &self.class {
            Class::Disk { .. } => Ok(()),
            Class::Cdrom(drive) => drive.ready().map(|_| ()),
        }
    }

    fn peripheral_type(&self) -> u8 {
        if matches!(self.class, Class::Disk { .. }) { 0 } else { 5 }
    }

    fn inquiry(&self, cdb: Cdb) -> Result<Reply, Sense> {
        let (evpd, page) = (cdb.bit(1, 1), cdb.byte(2));
        let data = match (evpd, page) {
            (false, 0) => {
                let disk = matches!(self.class, Class::Disk { .. });
                let product: &[u8; 16] = if disk { b"DISK            " } else { b"CD-ROM          " };
                standard_inquiry(self.peripheral_type(), !disk, product)
            }
            (true, _) => {
                let body = self.vital_product_data(page).ok_or(Sense::INVALID_FIELD)?;
                // Every page is short.
                let mut data = vec![self.peripheral_type(), page, 0, body.len() as u8];
                data.extend(body);
                data
            }
            (false, _) => return Err(Sense::INVALID_FIELD),
        };
        limited(data, cdb.number(3, 2))
    }

    /// A page's content (SPC-4, 7.8; SBC-3, 6.6).
    fn vital_product_data(&self, page: u8) -> Option<Vec<u8>> {
        let disk = match &self.class {
            Class::Disk { read_only, .. } => Some(*read_only),
            Class::Cdrom(_) => None,
        };
        Some(match (page, disk) {
            (0x00, Some(_)) => vec![0x00, 0x80, 0x83, 0x86, 0xb0, 0xb1, 0xb2],
            (0x00, None) => vec![0x00, 0x80, 0x83, 0x86],
            (0x80, _) => self.name.as_bytes().to_vec(),
            (0x83, _) => {
                // Of the unit, in ASCII, made of the vendor and what the vendor says.
                let mut body = vec![0x02, 0x01, 0, (VENDOR.len() + self.name.len()) as u8];
                body.extend(VENDOR);
                body.extend(self.name.as_bytes());
                body
            }
            (0x86, _) => {
                let mut body = vec![0; 60];
                // Simple tasks only.
                body[1] = 0x01;
                body
            }
            (0xb0, Some(_)) => {
                let mut body = vec![0; 0x3c];
                let mut put = |at: usize, value: &[u8]| body[at - 4..at - 4 + value.len()].copy_from_slice(value);
                // A length of zero means nothing in WRITE SAME.
                put(4, &[1]);
                put(6, &(1u16 << PHYSICAL_EXPONENT).to_be_bytes());
                put(8, &((REQUEST_BYTES / DISK_BLOCK) as u32).to_be_bytes());
                put(20, &(UNMAP_BLOCKS as u32).to_be_bytes());
                put(24, &(UNMAP_RANGES as u32).to_be_bytes());
                put(28, &(1u32 << PHYSICAL_EXPONENT).to_be_bytes());
                put(36, &WRITE_SAME_BLOCKS.to_be_bytes());
                body
            }
            (0xb1, Some(_)) => {
                let mut body = vec![0; 0x3c];
                // It does not rotate.
                body[1] = 1;
                body
            }
            // UNMAP, WRITE SAME with UNMAP; what is unmapped reads as zeroes. Thin.
            (0xb2, Some(false)) => vec![0, 0xe4, 0x02, 0],
            (0xb2, Some(true)) => vec![0, 0, 0, 0],
            _ => return None,
        })
    }

    /// `header` is the length of the answer's header: 4 or 8 bytes.
    fn mode_sense(&self, cdb: Cdb, header: usize) -> Result<Reply, Sense> {
        let (control, page, subpage) = (cdb.byte(2) >> 6, cdb.byte(2) & 0x3f, cdb.byte(3));
        if control == 3 {
            return Err(Sense::NOT_SAVED);
        }
        if !matches!(subpage, 0 | 0xff) {
            return Err(Sense::INVALID_FIELD);
        }
        let mut pages = Vec::new();
        for (number, mut body) in self.mode_pages() {
            if page == number || page == 0x3f {
                if control == 1 {
                    // None of it can be changed.
                    body.fill(0);
                }
                pages.extend([number, body.len() as u8]);
                pages.extend(body);
            }
        }
        if pages.is_empty() {
            return Err(Sense::INVALID_FIELD);
        }
        let (specific, blocks) = match &self.class {
            // FUA is known.
            Class::Disk { read_only, blocks } => (0x10 | u8::from(*read_only) << 7, Some(*blocks)),
            Class::Cdrom(_) => (0, None),
        };
        let descriptor = match blocks.filter(|_| !cdb.bit(1, 0x08)) {
            None => Vec::new(),
            Some(blocks) => {
                let blocks = u32::try_from(blocks).unwrap_or(u32::MAX);
                [&blocks.to_be_bytes()[..], &(DISK_BLOCK as u32).to_be_bytes()].concat()
            }
        };
        let mut data = vec![0; header];
        data.extend(&descriptor);
        data.extend(&pages);
        // All pages together have fewer than 100 bytes.
        if header == 4 {
            data[0] = (data.len() - 1) as u8;
            (data[2], data[3]) = (specific, descriptor.len() as u8);
            limited(data, cdb.number(4, 1))
        } else {
            data[1] = (data.len() - 2) as u8;
            (data[3], data[7]) = (specific, descriptor.len() as u8);
            limited(data, cdb.number(7, 2))
        }
    }

    /// Number and content of each (SPC-4, 7.5; SBC-3, 6.5; MMC-6, 7.2).
    fn mode_pages(&self) -> Vec<(u8, Vec<u8>)> {
        match &self.class {
            Class::Disk { read_only, .. } => {
                let mut caching = vec![0; 18];
                // What is written waits in a cache until it is flushed.
                caching[0] = if *read_only { 0 } else { 0x04 };
                let mut control = vec![0; 10];
                // Tasks are reordered as it suits.
                control[1] = 0x10;
                control[6..8].fill(0xff);
                vec![(0x01, vec![0; 10]), (0x08, caching), (0x0a, control)]
            }
            Class::Cdrom(drive) => vec![(0x01, vec![0; 6]), (0x2a, drive.capabilities())],
        }
    }

    fn report_opcodes(&self, cdb: Cdb) -> Result<Reply, Sense> {
        let (timeouts, how) = (cdb.bit(2, 0x80), cdb.byte(2) & 0x07);
        let (opcode, action) = (cdb.byte(3), cdb.number(4, 2));
        let allocation = cdb.number(6, 4);
        // No timeouts are recommended.
        let descriptor: &[u8] = if timeouts { &[0, 0x0a, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0] } else { &[] };
        let known = COMMANDS.iter().filter(|entry| self.has(entry.of));
        if how == 0 {
            let mut all = vec![0; 4];
            for Entry { opcode, action, usage, .. } in known {
                let flags = u8::from(action.is_some()) | u8::from(timeouts) << 1;
                all.extend([*opcode, 0, 0, action.unwrap_or(0), 0, flags, 0, usage.len() as u8]);
                all.extend(descriptor);
            }
            let len = (all.len() - 4) as u32;
            all[..4].copy_from_slice(&len.to_be_bytes());
            return limited(all, allocation);
        }
        let mut these = known.filter(|entry| entry.opcode == opcode).peekable();
        let has_actions = these.peek().is_some_and(|entry| entry.action.is_some());
        let found = match how {
            1 if has_actions => return Err(Sense::INVALID_FIELD),
            2 if these.peek().is_some() && !has_actions => return Err(Sense::INVALID_FIELD),
            1..=3 => these.find(|entry| entry.action.is_none_or(|known| u64::from(known) == action)),
            _ => return Err(Sense::INVALID_FIELD),
        };
        let data = match found {
            None => vec![0, 1, 0, 0],
            Some(Entry { action, usage, .. }) => {
                let mut data = vec![0, 3 | u8::from(timeouts) << 7, 0, usage.len() as u8];
                data.extend(*usage);
                if let (Some(action), Some(byte)) = (action, data.get_mut(5)) {
                    // In the usage data the service action stands itself.
                    *byte = *byte & 0xe0 | action;
                }
                data.extend(descriptor);
                data
            }
        };
        limited(data, allocation)
    }
}

fn standard_inquiry(peripheral: u8, removable: bool, product: &[u8; 16]) -> Vec<u8> {
    // SPC-4; LUNs by the report; fixed response format; commands are queued.
    let mut data = vec![peripheral, u8::from(removable) << 7, 0x06, 0x12, 31, 0, 0, 0x02];
    data.extend(VENDOR);
    data.extend(product);
    data.extend(REVISION);
    data
}

/// Every target has one logical unit, number 0.
fn report_luns(cdb: Cdb) -> Result<Reply, Sense> {
    let luns: &[u8] = match cdb.byte(2) {
        0 | 2 => &[0; 8],
        // There are no well known ones.
        1 => &[],
        _ => return Err(Sense::INVALID_FIELD),
    };
    let mut data = vec![0, 0, 0, luns.len() as u8, 0, 0, 0, 0];
    data.extend(luns);
    limited(data, cdb.number(6, 4))
}

pub(super) fn absent(cdb: Cdb) -> Result<Reply, Sense> {
    match cdb.opcode() {
        op::INQUIRY if !cdb.bit(1, 1) && cdb.byte(2) == 0 => {
            limited(standard_inquiry(NOBODY, false, &[b' '; 16]), cdb.number(3, 2))
        }
        op::REPORT_LUNS => report_luns(cdb),
        op::REQUEST_SENSE => limited(Sense::NO_UNIT.bytes().to_vec(), cdb.number(4, 1)),
        _ => Err(Sense::NO_UNIT),
    }
}
