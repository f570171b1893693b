//! `understudy-ocf install`: the links by which the cluster finds the agents.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::AGENTS;

/// Provider: the middle of `ocf:understudy:vmm`.
pub const PROVIDER: &str = "understudy";

/// Make `resource.d/understudy/AGENT` links to `executable` below `ocf_root`. What is there and is not a link is not touched.
pub fn install(ocf_root: &Path, executable: &Path) -> Result<Vec<PathBuf>> {
    if !executable.is_absolute() {
        bail!("the agents' executable must be given with its absolute path, not {}", executable.display());
    }
    let dir = ocf_root.join("resource.d").join(PROVIDER);
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let mut links = Vec::new();
    for name in AGENTS {
        let link = dir.join(name);
        match fs::symlink_metadata(&link) {
            Ok(found) if !found.is_symlink() => bail!("{} exists and is not a link; remove it first", link.display()),
            Ok(_) => fs::remove_file(&link).with_context(|| format!("cannot replace {}", link.display()))?,
            Err(_) => {}
        }
        symlink(executable, &link).with_context(|| format!("cannot create the link {}", link.display()))?;
        links.push(link);
    }
    Ok(links)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_made_and_made_again() {
        let root = tempfile::tempdir().unwrap();
        for executable in ["/usr/libexec/understudy/understudy-ocf", "/opt/understudy-ocf"] {
            let links = install(root.path(), Path::new(executable)).unwrap();
            assert_eq!(links.len(), AGENTS.len());
            assert_eq!(fs::read_link(root.path().join("resource.d/understudy/vmm")).unwrap(), Path::new(executable));
        }
    }

    #[test]
    fn a_file_that_is_not_ours_is_left_alone() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("resource.d/understudy");
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("vmm"), "mine").unwrap();
        assert!(install(root.path(), Path::new("/x")).is_err());
        assert_eq!(fs::read_to_string(dir.join("vmm")).unwrap(), "mine");
    }
}
