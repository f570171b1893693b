//! What the agents ask of the cluster, as a trait: the decisions are tested with a cluster made of values.

use ocf::Deadline;
use understudy_protocol::ids::Generation;

use crate::xml::{Element, escape};

/// Score that stands for infinity in Pacemaker.
const INFINITY: i32 = 1_000_000;

/// Why the cluster did not do or say something.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClusterError {
    /// There is no cluster software on this node.
    #[error("no cluster here: {0}")]
    Absent(String),
    /// There is, and it failed.
    #[error("{0}")]
    Failed(String),
}

/// Result of a question to the cluster.
pub type Result<T> = std::result::Result<T, ClusterError>;

/// A node as the cluster sees it now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Name.
    pub name: String,
    /// In the membership and running the cluster's software.
    pub online: bool,
    /// Lost, and not known to be dead: fencing has not confirmed it.
    pub unclean: bool,
}

/// The cluster, with a bound on every question.
pub trait Cluster {
    /// This node's name.
    fn node_name(&self, deadline: Deadline) -> Result<String>;
    /// Whether this partition has quorum.
    fn quorate(&self, deadline: Deadline) -> Result<bool>;
    /// This node's copy of the CIB.
    fn cib(&self, deadline: Deadline) -> Result<Cib>;
    /// `node`'s own copy of the CIB.
    fn cib_of(&self, node: &str, deadline: Deadline) -> Result<Cib>;
    /// All nodes.
    fn members(&self, deadline: Deadline) -> Result<Vec<Member>>;
    /// Store a permanent attribute of `node`.
    fn set_node_attribute(&self, node: &str, name: &str, value: &str, deadline: Deadline) -> Result<()>;
    /// Set a transient attribute of this node (it is gone when the node restarts), or delete it.
    fn set_transient_attribute(&self, name: &str, value: Option<&str>, deadline: Deadline) -> Result<()>;
    /// Create a constraint or change it to this.
    fn put_constraint(&self, xml: &str, deadline: Deadline) -> Result<()>;
    /// Remove a location constraint; it is no error if it is not there.
    fn delete_constraint(&self, id: &str, deadline: Deadline) -> Result<()>;
    /// Set this node's promotion score of a resource, or delete it.
    fn set_score(&self, resource: &str, score: Option<i32>, deadline: Deadline) -> Result<()>;
}

/// A copy of the cluster information base.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cib(Element);

/// The veto that stands for a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Veto {
    /// The only node that may be promoted.
    pub only: String,
    /// The clone that it is about.
    pub clone: String,
}

impl Cib {
    /// Read what `cibadmin --query` printed.
    pub fn parse(text: &str) -> std::result::Result<Self, String> {
        let root = Element::parse(text)?;
        if root.name != "cib" {
            return Err(format!("expected the element cib, found {}", root.name));
        }
        Ok(Self(root))
    }

    /// Values of a permanent attribute, by node.
    pub fn node_attributes(&self, name: &str) -> Vec<(String, String)> {
        let nodes = self.0.at(&["configuration", "nodes", "node"]);
        let of = |node: &&Element| {
            let value =
                node.at(&["instance_attributes", "nvpair"]).into_iter().find(|p| p.attribute("name") == Some(name))?;
            Some((node.attribute("uname")?.to_owned(), value.attribute("value")?.to_owned()))
        };
        nodes.iter().filter_map(of).collect()
    }

    /// A permanent attribute that counts generations, by node; the highest first.
    pub fn generations(&self, attribute: &str) -> Vec<(String, Generation)> {
        let mut found: Vec<_> = self
            .node_attributes(attribute)
            .into_iter()
            .filter_map(|(node, value)| Some((node, Generation(value.trim().parse().ok()?))))
            .collect();
        found.sort_by_key(|(_, generation)| std::cmp::Reverse(*generation));
        found
    }

    /// Promotion scores of a resource, by node.
    pub fn promotion_scores(&self, resource: &str) -> Vec<(String, i32)> {
        let attribute = format!("master-{resource}");
        let of = |state: &&Element| {
            let pairs = state.at(&["transient_attributes", "instance_attributes", "nvpair"]);
            let pair = pairs.into_iter().find(|p| p.attribute("name") == Some(&attribute))?;
            Some((state.attribute("uname")?.to_owned(), parse_score(pair.attribute("value")?)?))
        };
        self.0.at(&["status", "node_state"]).iter().filter_map(of).collect()
    }

    /// Id of the clone that contains the primitive `resource`.
    pub fn clone_of(&self, resource: &str) -> Option<String> {
        let in_clone = |e: &&&Element| {
            let is = |d: &&Element| d.name == "primitive" && d.attribute("id") == Some(resource);
            matches!(e.name.as_str(), "clone" | "master") && e.descendants().iter().any(is)
        };
        let resources = self.0.at(&["configuration", "resources"]);
        let all: Vec<&Element> = resources.iter().flat_map(|r| r.descendants()).collect();
        all.iter().find(in_clone).and_then(|e| e.attribute("id")).map(str::to_owned)
    }

    /// Id of the primitive of type `ocf:understudy:vmm` whose parameter `name` is `machine`.
    pub fn vmm_of(&self, machine: &str) -> Option<String> {
        let resources = self.0.at(&["configuration", "resources"]);
        let all: Vec<&Element> = resources.iter().flat_map(|r| r.descendants()).collect();
        let is = |e: &&&Element| {
            e.name == "primitive"
                && e.attribute("provider") == Some("understudy")
                && e.attribute("type") == Some("vmm")
                && e.at(&["instance_attributes", "nvpair"])
                    .iter()
                    .any(|p| p.attribute("name") == Some("name") && p.attribute("value") == Some(machine))
        };
        all.iter().find(is).and_then(|e| e.attribute("id")).map(str::to_owned)
    }

    /// Id and parameters of the plain primitive of type `ocf:understudy:vmm` that is `machine`, if it may be migrated. The error is a
    /// sentence.
    pub fn migratable(&self, machine: &str) -> std::result::Result<(String, Vec<(String, String)>), String> {
        let id = self.vmm_of(machine).ok_or_else(|| {
            format!("the cluster's configuration has no primitive of type ocf:understudy:vmm for machine {machine}")
        })?;
        if let Some(clone) = self.clone_of(&id) {
            return Err(format!("{id} is in the clone {clone}: a protected machine moves by being promoted elsewhere"));
        }
        let resources = self.0.at(&["configuration", "resources"]);
        let all: Vec<&Element> = resources.iter().flat_map(|r| r.descendants()).collect();
        let by_id = |tag: &str, id: &str| all.iter().copied().find(|e| e.name == tag && e.attribute("id") == Some(id));
        let primitive = by_id("primitive", &id).ok_or_else(|| format!("{id} is not in the configuration any more"))?;
        let template = primitive.attribute("template").and_then(|template| by_id("template", template));
        let (mut parameters, mut allowed): (Vec<(String, String)>, bool) = (Vec::new(), false);
        // What the primitive says itself counts more than its template.
        for element in template.into_iter().chain([primitive]) {
            for set in element.all("instance_attributes").chain(element.all("meta_attributes")) {
                let conditional = set.all("rule").next().is_some();
                if conditional
                    || set.attribute("id-ref").is_some()
                    || set.all("nvpair").any(|p| p.attribute("value").is_none())
                {
                    return Err(format!(
                        "{id} has parameters by rule or by reference, with which a migration cannot deal"
                    ));
                }
            }
            for pair in element.at(&["instance_attributes", "nvpair"]) {
                if let (Some(name), Some(value)) = (pair.attribute("name"), pair.attribute("value")) {
                    parameters.retain(|(other, _)| other != name);
                    parameters.push((name.to_owned(), value.to_owned()));
                }
            }
            for pair in element.at(&["meta_attributes", "nvpair"]) {
                if pair.attribute("name") == Some("allow-migrate") {
                    let value = pair.attribute("value").unwrap_or_default().to_ascii_lowercase();
                    allowed = ["true", "yes", "on", "y", "1"].contains(&value.as_str());
                }
            }
        }
        if !allowed {
            return Err(format!("{id} is not to be migrated: its meta attribute allow-migrate is not true"));
        }
        Ok((id, parameters))
    }

    /// The veto that stands for `machine`, if it is one of ours.
    pub fn veto(&self, machine: &str) -> Option<Veto> {
        let id = veto_id(machine);
        let constraints = self.0.at(&["configuration", "constraints", "rsc_location"]);
        let constraint = constraints.into_iter().find(|c| c.attribute("id") == Some(&id))?;
        let rule = constraint.all("rule").find(|r| r.attribute("score") == Some("-INFINITY"))?;
        if !matches!(rule.attribute("role"), Some("Promoted" | "Master")) {
            return None;
        }
        let expression = rule
            .all("expression")
            .find(|e| e.attribute("attribute") == Some("#uname") && e.attribute("operation") == Some("ne"))?;
        Some(Veto { only: expression.attribute("value")?.to_owned(), clone: constraint.attribute("rsc")?.to_owned() })
    }
}

/// Id of the constraint that carries the veto for `machine`.
pub fn veto_id(machine: &str) -> String {
    format!("understudy-veto-{machine}")
}

/// The constraint: nowhere but on `only` may `clone` be promoted.
pub fn veto_constraint(machine: &str, clone: &str, only: &str) -> String {
    let (id, clone, only) = (escape(&veto_id(machine)), escape(clone), escape(only));
    format!(
        "<rsc_location id=\"{id}\" rsc=\"{clone}\">\
         <rule id=\"{id}-rule\" role=\"Promoted\" score=\"-INFINITY\">\
         <expression id=\"{id}-node\" attribute=\"#uname\" operation=\"ne\" value=\"{only}\"/>\
         </rule></rsc_location>"
    )
}

/// Permanent node attribute that counts the takeovers of `machine`.
pub fn generation_attribute(machine: &str) -> String {
    format!("understudy-generation-{machine}")
}

/// Permanent node attribute that says which generation of `machine` ended on purpose: its guest was shut down, so its images
/// are of no use to anybody.
pub fn ended_attribute(machine: &str) -> String {
    format!("understudy-ended-{machine}")
}

fn parse_score(text: &str) -> Option<i32> {
    match text.trim() {
        "INFINITY" | "+INFINITY" => Some(INFINITY),
        "-INFINITY" => Some(-INFINITY),
        number => number.parse().ok(),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Two nodes, the machine `m1` in a promotable clone, generation 3 on n1, and what is put between the marks.
    pub(crate) fn cib_with(constraints: &str, scores: &[(&str, &str)], generations: &[(&str, u64)]) -> Cib {
        let mut nodes = String::new();
        for (i, node) in ["n1", "n2"].iter().enumerate() {
            let pair = generations.iter().find(|(n, _)| n == node).map_or(String::new(), |(_, g)| {
                format!("<instance_attributes id='nodes-{i}'><nvpair id='g{i}' name='understudy-generation-m1' value='{g}'/></instance_attributes>")
            });
            nodes += &format!("<node id='{i}' uname='{node}'>{pair}</node>");
        }
        let states: String = scores
            .iter()
            .map(|(node, score)| {
                format!(
                    "<node_state uname='{node}'><transient_attributes id='x'><instance_attributes id='status-x'>\
                     <nvpair id='s' name='master-vm-m1' value='{score}'/></instance_attributes></transient_attributes></node_state>"
                )
            })
            .collect();
        Cib::parse(&format!(
            "<cib epoch='1'><configuration><crm_config/><nodes>{nodes}</nodes><resources>\
             <clone id='vm-m1-clone'><primitive id='vm-m1' class='ocf' provider='understudy' type='vmm'>\
             <instance_attributes id='a'><nvpair id='b' name='name' value='m1'/></instance_attributes></primitive></clone>\
             </resources><constraints>{constraints}</constraints></configuration><status>{states}</status></cib>"
        ))
        .unwrap()
    }

    #[test]
    fn the_cib_says_who_holds_what() {
        let cib = cib_with("", &[("n1", "10001"), ("n2", "INFINITY")], &[("n1", 3), ("n2", 12)]);
        assert_eq!(cib.promotion_scores("vm-m1"), [("n1".into(), 10001), ("n2".into(), 1_000_000)]);
        assert_eq!(cib.promotion_scores("vm"), []);
        let generations = cib.generations("understudy-generation-m1");
        assert_eq!(generations, [("n2".into(), Generation(12)), ("n1".into(), Generation(3))]);
        assert_eq!(cib.clone_of("vm-m1").as_deref(), Some("vm-m1-clone"));
        assert_eq!(cib.clone_of("vm-m2"), None);
        assert_eq!(cib.vmm_of("m1").as_deref(), Some("vm-m1"));
    }

    #[test]
    fn only_a_plain_primitive_that_allows_it_can_be_migrated() {
        let cib = |inside: &str, clone: bool| {
            let primitive = format!(
                "<primitive id='vm-m1' class='ocf' provider='understudy' type='vmm' template='t'>\
                 <instance_attributes id='a'><nvpair id='b' name='name' value='m1'/><nvpair id='c' name='memory' value='64'/>\
                 </instance_attributes>{inside}</primitive>"
            );
            let primitive = if clone { format!("<clone id='c1'>{primitive}</clone>") } else { primitive };
            Cib::parse(&format!(
                "<cib><configuration><resources><template id='t'><instance_attributes id='ti'>\
                 <nvpair id='x' name='memory' value='32'/><nvpair id='y' name='vcpus' value='2'/></instance_attributes></template>\
                 {primitive}</resources></configuration></cib>"
            ))
            .unwrap()
        };
        let allow = "<meta_attributes id='m'><nvpair id='n' name='allow-migrate' value='True'/></meta_attributes>";
        let (id, parameters) = cib(allow, false).migratable("m1").unwrap();
        let pair = |k: &str, v: &str| (k.to_owned(), v.to_owned());
        assert_eq!(
            (id.as_str(), parameters),
            ("vm-m1", vec![pair("vcpus", "2"), pair("name", "m1"), pair("memory", "64")])
        );
        let refused = |inside: &str, clone, machine: &str| cib(inside, clone).migratable(machine).unwrap_err();
        assert!(refused("", false, "m1").contains("allow-migrate"));
        assert!(refused(allow, true, "m1").contains("protected"));
        assert!(refused(allow, false, "m2").contains("no primitive"));
        let ruled = format!("{allow}<instance_attributes id='r'><rule id='q'/></instance_attributes>");
        assert!(refused(&ruled, false, "m1").contains("by rule"));
    }

    #[test]
    fn a_veto_that_was_written_is_read_back() {
        let cib = cib_with(&veto_constraint("m1", "vm-m1-clone", "n1"), &[], &[]);
        assert_eq!(cib.veto("m1"), Some(Veto { only: "n1".into(), clone: "vm-m1-clone".into() }));
        assert_eq!(cib.veto("m2"), None);
    }

    #[test]
    fn a_constraint_that_forbids_less_is_no_veto() {
        let weak = veto_constraint("m1", "vm-m1-clone", "n1").replace("-INFINITY", "-100");
        assert_eq!(cib_with(&weak, &[], &[]).veto("m1"), None);
        let other_role = veto_constraint("m1", "vm-m1-clone", "n1").replace("Promoted", "Started");
        assert_eq!(cib_with(&other_role, &[], &[]).veto("m1"), None);
    }
}
