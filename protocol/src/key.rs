//! The key file: the secret that the nodes and boards of one cluster share.
//!
//! A key is 32 random bytes. Its file is text: 64 hexadecimal digits and a newline, mode 0400 or 0600. An administrator
//! makes it once (`understudy-serial keygen FILE`, or `head -c 32 /dev/urandom | od -An -vtx1 | tr -d ' \n' > FILE`) and
//! copies it to every node and board, as corosync's authkey. Whoever has the key may attach to any board and feed any
//! standby: [`Key::load`] therefore refuses a file that others than its owner can read or change.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use zeroize::{Zeroize, Zeroizing};

/// Bytes of a key.
pub const KEY_LEN: usize = 32;
/// Where the key is looked for unless something else is configured.
pub const DEFAULT_KEY_FILE: &str = "/etc/understudy/key";

/// A pre-shared key, and the file that it came from (so that errors can name it).
#[derive(Clone)]
pub struct Key {
    bytes: [u8; KEY_LEN],
    file: PathBuf,
}

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// No such file.
    #[error(
        "the key file {file} does not exist: copy it from another node of the cluster, or make the first one with \
         `understudy-serial keygen {file}`"
    )]
    Missing {
        /// The file.
        file: String,
    },
    /// The file cannot be read or written.
    #[error("cannot {what} the key file {file}: {cause}")]
    Io {
        /// `read` or `write`.
        what: &'static str,
        /// The file.
        file: String,
        /// What the kernel said.
        cause: io::Error,
    },
    /// Others can read it.
    #[error(
        "the key file {file} can be read or changed by others than its owner (mode {mode:04o}): run `chmod 0400 {file}`, \
         and make a new key if somebody may have read it"
    )]
    Exposed {
        /// The file.
        file: String,
        /// Its permission bits.
        mode: u32,
    },
    /// Not 64 hexadecimal digits.
    #[error(
        "the key file {file} must hold exactly 64 hexadecimal digits and a newline, but {why}: copy it again from another \
         node, or make a new one with `understudy-serial keygen` for all of them"
    )]
    Malformed {
        /// The file.
        file: String,
        /// What is wrong with it.
        why: String,
    },
    /// `keygen` onto an existing file.
    #[error(
        "the key file {file} exists already and was left as it is: remove it first if all nodes shall get a new key"
    )]
    Exists {
        /// The file.
        file: String,
    },
}

impl Key {
    /// Read a key file.
    pub fn load(file: impl AsRef<Path>) -> Result<Self, KeyError> {
        let path = file.as_ref();
        let name = || path.display().to_string();
        let io_error = |cause| KeyError::Io { what: "read", file: name(), cause };
        let opened = match File::open(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(KeyError::Missing { file: name() }),
            other => other.map_err(io_error)?,
        };
        let meta = opened.metadata().map_err(io_error)?;
        if !meta.is_file() {
            return Err(KeyError::Malformed { file: name(), why: "it is not a regular file".into() });
        }
        let mode = meta.permissions().mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(KeyError::Exposed { file: name(), mode });
        }
        let mut text = Zeroizing::new(Vec::with_capacity(128));
        opened.take(128).read_to_end(&mut text).map_err(io_error)?;
        let bytes = parse(&text).map_err(|why| KeyError::Malformed { file: name(), why })?;
        Ok(Self { bytes, file: path.to_owned() })
    }

    /// A key from given bytes, e.g. in tests. `file` is what errors will call it.
    pub fn from_bytes(bytes: [u8; KEY_LEN], file: impl Into<PathBuf>) -> Self {
        Self { bytes, file: file.into() }
    }

    /// Make a new random key and write it to `file` (mode 0400, durable). An existing file is never overwritten.
    pub fn generate(file: impl AsRef<Path>) -> Result<Self, KeyError> {
        let path = file.as_ref();
        let io_error = |cause| KeyError::Io { what: "write", file: path.display().to_string(), cause };
        let mut bytes = [0; KEY_LEN];
        getrandom::fill(&mut bytes).map_err(|e| io_error(io::Error::other(e.to_string())))?;
        let key = Self { bytes, file: path.to_owned() };
        let mut text = Zeroizing::new(String::with_capacity(2 * KEY_LEN + 1));
        for byte in &key.bytes {
            for nibble in [byte >> 4, byte & 15] {
                text.push(char::from(b"0123456789abcdef"[usize::from(nibble)]));
            }
        }
        text.push('\n');
        let mut created = match OpenOptions::new().write(true).create_new(true).mode(0o400).open(path) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                return Err(KeyError::Exists { file: path.display().to_string() });
            }
            other => other.map_err(io_error)?,
        };
        let written = created.write_all(text.as_bytes()).and_then(|()| created.sync_all());
        if let Err(e) = written {
            // Half a key would be refused by every later load with a less helpful sentence.
            let _ = std::fs::remove_file(path);
            return Err(io_error(e));
        }
        Ok(key)
    }

    /// The secret.
    pub fn bytes(&self) -> &[u8; KEY_LEN] {
        &self.bytes
    }

    /// The file it came from.
    pub fn file(&self) -> &Path {
        &self.file
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        self.bytes.zeroize();
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Key").field("file", &self.file).finish_non_exhaustive()
    }
}

fn parse(text: &[u8]) -> Result<[u8; KEY_LEN], String> {
    let digits = text.trim_ascii_end();
    if digits.len() != 2 * KEY_LEN {
        let at_least = if text.len() == 128 { "at least " } else { "" };
        return Err(format!("it holds {at_least}{} characters", digits.len()));
    }
    let mut bytes = [0; KEY_LEN];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let nibble = |c: u8| char::from(c).to_digit(16).ok_or("it holds something else than 0-9 and a-f".to_owned());
        // Two digits below 16 make at most 255.
        *byte = (nibble(pair[0])? * 16 + nibble(pair[1])?) as u8;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fs;

    fn written(content: &[u8], mode: u32) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        (dir, path)
    }

    #[test]
    fn a_generated_key_is_private_and_loads_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let key = Key::generate(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o400);
        assert_eq!(Key::load(&path).unwrap().bytes(), key.bytes());
        assert!(matches!(Key::generate(&path), Err(KeyError::Exists { .. })));
        assert!(!format!("{key:?}").contains(&format!("{:02x}", key.bytes()[0])) || format!("{key:?}").len() < 200);
    }

    #[test]
    fn a_file_that_others_can_read_is_refused_with_the_command_that_helps() {
        for mode in [0o440, 0o404, 0o644, 0o620] {
            let (_dir, path) = written(format!("{}\n", "ab".repeat(32)).as_bytes(), mode);
            let error = Key::load(&path).unwrap_err();
            assert!(error.to_string().contains("chmod 0400"), "{error}");
        }
    }

    #[test]
    fn wrong_lengths_and_wrong_letters_are_refused() {
        for bad in ["", "\n", &"a".repeat(63), &"a".repeat(65), &"a".repeat(5000), &"g".repeat(64)] {
            let (_dir, path) = written(bad.as_bytes(), 0o600);
            let error = Key::load(&path).unwrap_err();
            assert!(matches!(error, KeyError::Malformed { .. }), "{error}");
        }
        let (_dir, path) = written(format!("{}\r\n", "AB".repeat(32)).as_bytes(), 0o600);
        assert_eq!(Key::load(&path).unwrap().bytes(), &[0xab; 32]);
    }

    #[test]
    fn a_missing_key_names_the_command_that_makes_one() {
        let error = Key::load("/nonexistent/key").unwrap_err().to_string();
        assert!(error.contains("keygen /nonexistent/key"), "{error}");
        assert!(Key::load("/").is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_never_panic(text in proptest::collection::vec(any::<u8>(), 0..130)) {
            let _ = parse(&text);
        }
    }
}
