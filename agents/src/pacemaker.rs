//! The cluster through Pacemaker's command line tools: every call is bounded and its answer is XML or one word.

use std::time::Duration;

use ocf::command::{self, CommandError, Output};
use ocf::score::{PromotionScore, ScoreError};
use ocf::{Deadline, Environment};

use crate::cluster::{Cib, Cluster, ClusterError, Member, Result};
use crate::xml::Element;

/// Longest that a question to the local daemons may take, whatever the deadline allows. (What is *stored* goes through the
/// membership, and waits while that is being formed anew.)
const STEP: Duration = Duration::from_secs(5);
/// `CRM_EX_NOSUCH`: what was to be deleted is not there.
const NO_SUCH: i32 = 105;

/// The cluster that this node belongs to.
#[derive(Debug)]
pub struct Pacemaker<'a> {
    env: &'a Environment,
    node: Option<String>,
}

impl<'a> Pacemaker<'a> {
    /// With the environment that says where the tools are.
    pub fn new(env: &'a Environment) -> Self {
        Self { env, node: env.meta("on_node").map(str::to_owned) }
    }

    /// On a node whose name is known already.
    #[must_use]
    pub fn on_node(mut self, name: Option<String>) -> Self {
        self.node = name.or(self.node);
        self
    }

    fn run(&self, program: &str, arguments: &[&str], deadline: Deadline) -> Result<Output> {
        command::run(self.env, program, arguments, deadline).map_err(|e| match e {
            CommandError::Missing { .. } => ClusterError::Absent(e.to_string()),
            e => ClusterError::Failed(e.to_string()),
        })
    }

    fn ask(&self, doing: &str, program: &str, arguments: &[&str], deadline: Deadline) -> Result<String> {
        let output = self.run(program, arguments, deadline)?;
        if output.success() {
            return Ok(output.stdout);
        }
        Err(ClusterError::Failed(format!("{program} could not {doing}: {}", output.complaint())))
    }
}

impl Cluster for Pacemaker<'_> {
    fn node_name(&self, deadline: Deadline) -> Result<String> {
        if let Some(name) = &self.node {
            return Ok(name.clone());
        }
        let name = self.ask("say this node's name", "crm_node", &["-n"], deadline.within(STEP))?.trim().to_owned();
        if name.is_empty() {
            return Err(ClusterError::Failed("crm_node did not say this node's name".into()));
        }
        Ok(name)
    }

    fn quorate(&self, deadline: Deadline) -> Result<bool> {
        Ok(self.ask("say whether there is quorum", "crm_node", &["-q"], deadline.within(STEP))?.trim() == "1")
    }

    fn cib(&self, deadline: Deadline) -> Result<Cib> {
        let text = self.ask("read the CIB", "cibadmin", &["--query"], deadline.within(STEP))?;
        Cib::parse(&text).map_err(|e| ClusterError::Failed(format!("cibadmin printed an unreadable CIB: {e}")))
    }

    fn cib_of(&self, node: &str, deadline: Deadline) -> Result<Cib> {
        let text =
            self.ask(&format!("read the CIB of node {node}"), "cibadmin", &["--query", "--node", node], deadline)?;
        Cib::parse(&text).map_err(|e| ClusterError::Failed(format!("node {node} answered with an unreadable CIB: {e}")))
    }

    fn members(&self, deadline: Deadline) -> Result<Vec<Member>> {
        let text = self.ask("list the nodes", "crm_mon", &["--one-shot", "--output-as=xml"], deadline.within(STEP))?;
        let root =
            Element::parse(&text).map_err(|e| ClusterError::Failed(format!("crm_mon's answer is unreadable: {e}")))?;
        let member = |node: &&Element| {
            // Remote and guest nodes have no CIB and no part in decisions.
            if node.attribute("type").is_some_and(|t| t != "member") {
                return None;
            }
            Some(Member {
                name: node.attribute("name")?.to_owned(),
                online: node.attribute("online")? == "true",
                unclean: node.attribute("unclean")? == "true",
            })
        };
        Ok(root.at(&["nodes", "node"]).iter().filter_map(member).collect())
    }

    fn set_node_attribute(&self, node: &str, name: &str, value: &str, deadline: Deadline) -> Result<()> {
        let arguments = ["--node", node, "--lifetime", "forever", "--name", name, "--update", value];
        self.ask(&format!("store {name}={value} for node {node}"), "crm_attribute", &arguments, deadline).map(drop)
    }

    fn set_transient_attribute(&self, name: &str, value: Option<&str>, deadline: Deadline) -> Result<()> {
        let (doing, arguments) = match value {
            Some(value) => (format!("set {name}={value}"), vec!["--name", name, "--update", value]),
            None => (format!("delete {name}"), vec!["--name", name, "--delete"]),
        };
        self.ask(&doing, "attrd_updater", &arguments, deadline.within(STEP)).map(drop)
    }

    fn put_constraint(&self, xml: &str, deadline: Deadline) -> Result<()> {
        let arguments = ["--modify", "--allow-create", "--scope", "constraints", "--xml-text", xml];
        self.ask("store the constraint", "cibadmin", &arguments, deadline).map(drop)
    }

    fn delete_constraint(&self, id: &str, deadline: Deadline) -> Result<()> {
        let xml = format!("<rsc_location id=\"{}\"/>", crate::xml::escape(id));
        let output = self.run("cibadmin", &["--delete", "--scope", "constraints", "--xml-text", &xml], deadline)?;
        if output.success() || output.code == Some(NO_SUCH) {
            return Ok(());
        }
        Err(ClusterError::Failed(format!("cibadmin could not delete the constraint {id}: {}", output.complaint())))
    }

    fn set_score(&self, resource: &str, score: Option<i32>, deadline: Deadline) -> Result<()> {
        let promotion = PromotionScore::of(self.env, resource);
        let deadline = deadline.within(STEP);
        let done = match score {
            Some(score) => promotion.set(score, deadline),
            None => promotion.delete(deadline),
        };
        done.map_err(|e| match e {
            ScoreError::Command(CommandError::Missing { .. }) => ClusterError::Absent(e.to_string()),
            e => ClusterError::Failed(e.to_string()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_the_tools_there_is_no_cluster() {
        let env = Environment::from_pairs([("PATH", "/nonexistent")]);
        let soon = Deadline::after(Duration::from_secs(5));
        let pacemaker = Pacemaker::new(&env);
        assert!(matches!(pacemaker.cib(soon), Err(ClusterError::Absent(_))));
        assert!(matches!(pacemaker.set_score("vm", Some(5), soon), Err(ClusterError::Absent(_))));
    }
}
